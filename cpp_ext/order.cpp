// The order of the samples: the keyed permutation of engine/permutation.py, which says what it is and has the same in numpy.

#include <cstdint>

namespace {

constexpr int kRounds = 6;
constexpr uint32_t kStream = 0x6F726465;

// The first output word of Philox4x32-10.
uint32_t first_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * c0, product_1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product_1);
    c3 = static_cast<uint32_t>(product_0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

}  // namespace

// records[i] = permutation(seed, epochs[i])[indices[i]] over `count` records, for i < size; 2 * half_bits bits hold `count`.
extern "C" void permute(uint64_t seed, const int64_t* epochs, const int64_t* indices, int64_t size, int64_t count,
                        int32_t half_bits, int64_t* records) {
  const uint64_t mask = (uint64_t{1} << half_bits) - 1;
  for (int64_t number = 0; number < size; ++number) {
    const uint64_t epoch = static_cast<uint64_t>(epochs[number]);
    uint64_t value = static_cast<uint64_t>(indices[number]);
    do {
      uint64_t left = value >> half_bits, right = value & mask;
      for (uint32_t round = 0; round < kRounds; ++round) {
        const uint64_t word = first_word(static_cast<uint32_t>(right), static_cast<uint32_t>(epoch),
                                         static_cast<uint32_t>(epoch >> 32), kStream + round, seed);
        const uint64_t mixed = left ^ (word & mask);
        left = right;
        right = mixed;
      }
      value = left << half_bits | right;
    } while (value >= static_cast<uint64_t>(count));
    records[number] = static_cast<int64_t>(value);
  }
}
