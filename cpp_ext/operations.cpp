// The fused operations of engine/kernels for the CPU: the same Philox words as the Triton kernels and the torch reference, and
// normals to fp32 accuracy.
//
// A sample is walked in blocks of up to kBlock elements in logical (C, H, W) order: noise is drawn into a buffer that stays in
// the first-level cache, combined with what is read, and written once. All loops over a block vectorise. Threads come from
// torch's own pool (at::parallel_for), whose C entry point the caller hands over, so that no torch header is needed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kGroups = 64;  // Philox calls per block, each for four elements
constexpr int kBlock = 4 * kGroups;
constexpr uint32_t kNoise = 0, kPosterior = 1, kNoiseOffset = 3, kInputPerturbation = 4, kRounding = 8;

using Task = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Task task, void* context);

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(_Float16 value) { return static_cast<float>(value); }
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void narrow(float value, float* target) { *target = value; }
inline void narrow(float value, _Float16* target) { *target = static_cast<_Float16>(value); }
// Rounds to the nearest even; a NaN stays one.
inline void narrow(float value, BFloat16* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  target->bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

// sqrt(-2 ln uniform). Near 1 the uniform would round in fp32, so the logarithm is summed there from 1 - uniform, which is
// exact; elsewhere it is Cephes' logf.
inline float radius(uint32_t word) {
  const int32_t number = static_cast<int32_t>(word >> 8);
  const float rest = (static_cast<float>(16777215 - number) + 0.5f) * 0x1p-24f;
  const float series =
      rest * (1 + rest * (1 / 2.f + rest * (1 / 3.f + rest * (1 / 4.f + rest * (1 / 5.f + rest * (1 / 6.f))))));
  const float uniform = (static_cast<float>(number) + 0.5f) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &uniform, sizeof bits);
  // Mantissa in [sqrt(1/2), sqrt(2)) and the exponent that goes with it.
  const uint32_t shifted = bits - 0x3F3504F3u;
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const uint32_t mantissa_bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
  float x;
  std::memcpy(&x, &mantissa_bits, sizeof x);
  x -= 1;
  const float square = x * x;
  float y = 7.0376836292e-2f;
  y = y * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * square - 2.12194440e-4f * exponent - 0.5f * square;
  const float logarithm = x + y + 0.693359375f * exponent;
  return std::sqrt(2 * (rest < 0.03125f ? series : -logarithm));
}

// cos and sin of 2 pi uniform: an exact quarter turn from the integer, and Cephes' polynomials for the rest.
inline void turn(uint32_t word, float* cosine, float* sine) {
  const int32_t number = static_cast<int32_t>(word >> 8);
  const int32_t quarter = (number + (1 << 21)) >> 22;
  const float x = (static_cast<float>(number - (quarter << 22)) + 0.5f) * (1.5707963267948966f / 4194304);
  const float square = x * x;
  const float s = x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
  const float c = 1 - 0.5f * square +
                  square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
  const bool odd = quarter & 1;
  const float first = odd ? s : c, second = odd ? c : s;
  *cosine = (quarter + 1) & 2 ? -first : first;
  *sine = quarter & 2 ? -second : second;
}

// Philox4x32-10 of `count` consecutive groups.
inline void philox(int64_t seed, int64_t slot, uint32_t stream, uint32_t first_group, int count, uint32_t words[4][kGroups]) {
  for (int i = 0; i < count; ++i) {
    words[0][i] = first_group + static_cast<uint32_t>(i);
    words[1][i] = static_cast<uint32_t>(slot);
    words[2][i] = static_cast<uint32_t>(static_cast<uint64_t>(slot) >> 32);
    words[3][i] = stream;
  }
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round, key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u) {
    for (int i = 0; i < count; ++i) {
      const uint64_t product_0 = static_cast<uint64_t>(words[0][i]) * 0xD2511F53u;
      const uint64_t product_1 = static_cast<uint64_t>(words[2][i]) * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(product_1 >> 32) ^ words[1][i] ^ key_0;
      words[2][i] = static_cast<uint32_t>(product_0 >> 32) ^ words[3][i] ^ key_1;
      words[1][i] = static_cast<uint32_t>(product_1);
      words[3][i] = static_cast<uint32_t>(product_0);
    }
  }
}

// Unit normals of one block, in element order.
void normals(int64_t seed, int64_t slot, uint32_t stream, int64_t first_element, float* out) {
  uint32_t words[4][kGroups];
  philox(seed, slot, stream, static_cast<uint32_t>(first_element / 4), kGroups, words);
  float values[4][kGroups];
  for (int pair = 0; pair < 2; ++pair) {
    for (int i = 0; i < kGroups; ++i) {
      const float r = radius(words[2 * pair][i]);
      float cosine, sine;
      turn(words[2 * pair + 1][i], &cosine, &sine);
      values[2 * pair][i] = r * cosine;
      values[2 * pair + 1][i] = r * sine;
    }
  }
  for (int i = 0; i < kGroups; ++i) {
    for (int j = 0; j < 4; ++j) out[4 * i + j] = values[j][i];
  }
}

// The unit normal of one element, for draws that many elements share.
float normal(int64_t seed, int64_t slot, uint32_t stream, int64_t element) {
  uint32_t words[4][kGroups];
  philox(seed, slot, stream, static_cast<uint32_t>(element / 4), 1, words);
  const int pair = static_cast<int>(element % 4) / 2;
  float cosine, sine;
  turn(words[2 * pair + 1][0], &cosine, &sine);
  return radius(words[2 * pair][0]) * (element % 2 == 0 ? cosine : sine);
}

template <typename T>
void load(const void* base, int64_t offset, int64_t stride, int count, float* out) {
  const T* source = static_cast<const T*>(base) + offset;
  if (stride == 1) {
    for (int i = 0; i < count; ++i) out[i] = widen(source[i]);
  } else {
    for (int i = 0; i < count; ++i) out[i] = widen(source[i * stride]);
  }
}

template <typename T>
void store(const float* values, int count, void* base, int64_t offset, int64_t stride) {
  T* target = static_cast<T*>(base) + offset;
  if (stride == 1) {
    for (int i = 0; i < count; ++i) narrow(values[i], target + i);
  } else {
    for (int i = 0; i < count; ++i) narrow(values[i], target + i * stride);
  }
}

}  // namespace

extern "C" {

// A walk over samples of `rows` x `positions` elements, as engine/kernels/layout.py tiles them: rows are channels, or there is
// one row of everything. Strides are in elements; `channel_positions` is the positions of one channel in either case.
struct Walk {
  int64_t samples, rows, positions, channel_positions;
  int64_t strides[3];         // of what is written, and of what else has its shape: sample, row, position
  int64_t mean_strides[3];    // of mean and std
  const float* coefficients;  // [5 or 6, samples]: alpha, sigma, c_x, c_e, weight, and Huber's constant
  const int64_t* seed;
  const int64_t* slots;
  const void* mean;
  const void* std;  // null: x0 is the mean
  float offset;
};

struct AddNoise {
  Walk walk;
  void* noisy;
  float perturbation;
};

struct DiffusionLoss {
  Walk walk;
  void* gradient;
  const void* prediction;
  const float* scale;
  int64_t target_elements;  // per sample; what lies beyond is learned variance
  float* loss;
  double* partial;      // one per block
  const uint8_t* mask;  // [samples, channel_positions], 255 is a weight of one; null: every element has that weight
  bool huber;           // or the squared error
};

struct AdamWEma {
  float *master, *exp_avg, *exp_avg_sq;
  const void* gradient;
  void* weights;  // null: there are none beside the master
  float* ema;     // null: no average is kept
  const float *learning_rate, *factor, *step, *ema_weight;
  double beta_1, beta_2, epsilon, weight_decay;
  const int64_t* rounding;  // seed and place; null: fp32 masters, which are not rounded
  int64_t elements;
  bool lion;
};
}

namespace {

float coefficient(const Walk& walk, int row, int64_t sample) { return walk.coefficients[row * walk.samples + sample]; }

int64_t blocks_of(const Walk& walk) { return (walk.positions + kBlock - 1) / kBlock; }

// Where a block lies.
struct Block {
  Block(const Walk& walk, int64_t number) {
    const int64_t blocks = blocks_of(walk);
    start = number % blocks * kBlock;
    row = number / blocks % walk.rows;
    sample = number / blocks / walk.rows;
    count = static_cast<int>(std::min<int64_t>(kBlock, walk.positions - start));
    element = row * walk.positions + start;
    slot = walk.slots[sample];
    place = sample * walk.strides[0] + row * walk.strides[1] + start * walk.strides[2];
    mean_place = sample * walk.mean_strides[0] + row * walk.mean_strides[1] + start * walk.mean_strides[2];
  }
  int64_t start, row, sample, element, slot, place, mean_place;
  int count;
};

// e + offset n.
void draw_noise(const Walk& walk, const Block& block, float* noise) {
  normals(*walk.seed, block.slot, kNoise, block.element, noise);
  if (walk.offset == 0) return;
  int64_t last = -1;
  float shared = 0;
  for (int i = 0; i < block.count; ++i) {
    const int64_t channel = (block.element + i) / walk.channel_positions;
    if (channel != last) shared = walk.offset * normal(*walk.seed, block.slot, kNoiseOffset, last = channel);
    noise[i] += shared;
  }
}

// x0 of the first `count` elements: the mean, or one draw from the posterior.
template <typename T>
void draw_clean(const Walk& walk, const Block& block, int count, float* clean) {
  load<T>(walk.mean, block.mean_place, walk.mean_strides[2], count, clean);
  if (walk.std == nullptr) return;
  float std[kBlock], posterior[kBlock];
  load<T>(walk.std, block.mean_place, walk.mean_strides[2], count, std);
  normals(*walk.seed, block.slot, kPosterior, block.element, posterior);
  for (int i = 0; i < count; ++i) clean[i] += std[i] * posterior[i];
}

// Multiplies the first `count` elements by the weights of their positions, which all channels share.
void apply_mask(const Walk& walk, const Block& block, const uint8_t* mask, int count, float* values) {
  mask += block.sample * walk.channel_positions;
  int64_t position = block.element % walk.channel_positions;
  for (int begin = 0; begin < count; position = 0) {
    const int end = static_cast<int>(std::min<int64_t>(count, begin + walk.channel_positions - position));
    for (int i = begin; i < end; ++i) values[i] *= static_cast<float>(mask[position + i - begin]) * (1 / 255.f);
    begin = end;
  }
}

// From the errors and the slopes of a squared error, those of 2 c (sqrt(error^2 + c^2) - c).
void apply_huber(float c, int count, float* slopes, float* errors) {
  for (int i = 0; i < count; ++i) {
    const float size = std::abs(errors[i]);
    // Of a large error, whose square may overflow, the root is the error.
    const float share = c / (size > 1e18f ? size : std::sqrt(errors[i] * errors[i] + c * c));
    slopes[i] *= share;
    errors[i] *= 2 / (1 + share);
  }
}

template <typename T>
void add_noise_task(int64_t begin, int64_t end, void* context) {
  const AddNoise& task = *static_cast<const AddNoise*>(context);
  const Walk& walk = task.walk;
  float clean[kBlock], noise[kBlock], extra[kBlock];
  for (int64_t number = begin; number < end; ++number) {
    const Block block(walk, number);
    draw_clean<T>(walk, block, block.count, clean);
    draw_noise(walk, block, noise);
    if (task.perturbation != 0) {
      normals(*walk.seed, block.slot, kInputPerturbation, block.element, extra);
      for (int i = 0; i < block.count; ++i) noise[i] += task.perturbation * extra[i];
    }
    const float alpha = coefficient(walk, 0, block.sample), sigma = coefficient(walk, 1, block.sample);
    for (int i = 0; i < block.count; ++i) clean[i] = alpha * clean[i] + sigma * noise[i];
    store<T>(clean, block.count, task.noisy, block.place, walk.strides[2]);
  }
}

// T is the prediction's type, M that of mean and std.
template <typename T, typename M>
void diffusion_loss_task(int64_t begin, int64_t end, void* context) {
  const DiffusionLoss& task = *static_cast<const DiffusionLoss*>(context);
  const Walk& walk = task.walk;
  float clean[kBlock], noise[kBlock], error[kBlock];
  for (int64_t number = begin; number < end; ++number) {
    const Block block(walk, number);
    const int inside = static_cast<int>(std::clamp<int64_t>(task.target_elements - block.element, 0, block.count));
    const float factor = coefficient(walk, 4, block.sample) / static_cast<float>(task.target_elements);
    double sum = 0;
    if (inside > 0) {
      const float c_x = coefficient(walk, 2, block.sample), c_e = coefficient(walk, 3, block.sample);
      load<T>(task.prediction, block.place, walk.strides[2], inside, error);
      draw_noise(walk, block, noise);
      for (int i = 0; i < inside; ++i) error[i] -= c_e * noise[i];
      if (c_x != 0) {
        draw_clean<M>(walk, block, inside, clean);
        for (int i = 0; i < inside; ++i) error[i] -= c_x * clean[i];
      }
      float lanes[8] = {};
      if (task.mask == nullptr && !task.huber) {
        for (int i = 0; i < inside; ++i) lanes[i % 8] += error[i] * error[i];
      } else {
        // The loss of an element is its slope, which becomes the gradient, times another factor: both are the error at first.
        std::copy(error, error + inside, noise);
        if (task.mask != nullptr) apply_mask(walk, block, task.mask, inside, error);
        if (task.huber) apply_huber(coefficient(walk, 5, block.sample), inside, error, noise);
        for (int i = 0; i < inside; ++i) lanes[i % 8] += error[i] * noise[i];
      }
      for (float lane : lanes) sum += lane;
    }
    const float scale = 2 * factor * *task.scale;
    for (int i = 0; i < block.count; ++i) error[i] = i < inside ? scale * error[i] : 0;
    store<T>(error, block.count, task.gradient, block.place, walk.strides[2]);
    task.partial[number] = factor * sum;
  }
}

// Blocks per turn of a thread: enough work to be worth waking one.
constexpr int64_t kGrain = 8;

inline float sign(float value) { return static_cast<float>((value > 0) - (value < 0)); }

// What bf16 holds of a value, up where the digits that are lost and the noise, 16 bits, add up to one.
inline float round_up_by_chance(float value, uint32_t noise, BFloat16* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  target->bits = static_cast<uint16_t>((bits + noise) >> 16);
  return widen(*target);
}

// A step on weights and moments in bf16, by tiles as engine/kernels/rounding.py has them. In a library whose products and sums are
// not fused, so that the bits are those of the other devices.
constexpr int64_t kQuarter = 1024, kTile = 4 * kQuarter;

template <typename G>
void rounded_task(int64_t begin, int64_t end, void* context) {
  const AdamWEma& task = *static_cast<const AdamWEma*>(context);
  const float factor = *task.factor, beta_1 = static_cast<float>(task.beta_1), rest_1 = static_cast<float>(1 - task.beta_1);
  const float beta_2 = static_cast<float>(task.beta_2), rest_2 = static_cast<float>(1 - task.beta_2);
  const float update_rate = static_cast<float>(*task.learning_rate / (1 - std::pow(task.beta_1, *task.step)));
  const float root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(task.beta_2, *task.step)));
  const float rate = *task.learning_rate, decay = rate * static_cast<float>(task.weight_decay);
  const float epsilon = static_cast<float>(task.epsilon), weight = *task.ema_weight;
  const int64_t slot = static_cast<int64_t>(*task.step) + (task.rounding[1] << 32);
  BFloat16* __restrict weights = reinterpret_cast<BFloat16*>(task.master);
  BFloat16* __restrict exp_avg = reinterpret_cast<BFloat16*>(task.exp_avg);
  BFloat16* __restrict exp_avg_sq = reinterpret_cast<BFloat16*>(task.exp_avg_sq);
  float* __restrict ema = task.ema;
  const G* __restrict gradients = static_cast<const G*>(task.gradient);
  uint32_t words[4][kGroups];
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t group = 0; group < kQuarter; group += kGroups) {
      philox(task.rounding[0], slot, kRounding, static_cast<uint32_t>(tile * kQuarter + group), kGroups, words);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t start = tile * kTile + quarter * kQuarter + group;
        const int count = static_cast<int>(std::clamp<int64_t>(task.elements - start, 0, kGroups));
        for (int j = 0; j < count; ++j) {
          const int64_t i = start + j;
          const uint32_t word = words[quarter][j];
          const float gradient = widen(gradients[i]) * factor, before = widen(weights[i]), momentum = widen(exp_avg[i]);
          float value = before - decay * before, first;
          if (task.lion) {
            value -= rate * sign(beta_1 * momentum + rest_1 * gradient);
            first = beta_2 * momentum + rest_2 * gradient;
          } else {
            first = momentum + rest_1 * (gradient - momentum);
            const float second = beta_2 * widen(exp_avg_sq[i]) + rest_2 * gradient * gradient;
            value -= update_rate * first / (std::sqrt(second) * root_correction + epsilon);
            round_up_by_chance(second, ((word >> 24) << 8) + 0x80, exp_avg_sq + i);
          }
          round_up_by_chance(first, (((word >> 16) & 0xFF) << 8) + 0x80, exp_avg + i);
          value = round_up_by_chance(value, word & 0xFFFF, weights + i);
          if (ema != nullptr) ema[i] += weight * (value - ema[i]);
        }
      }
    }
  }
}

template <typename G, typename W>
void adamw_ema_task(int64_t begin, int64_t end, void* context) {
  const AdamWEma& task = *static_cast<const AdamWEma*>(context);
  const float factor = *task.factor, rest_1 = static_cast<float>(1 - task.beta_1);
  const float beta_2 = static_cast<float>(task.beta_2), rest_2 = static_cast<float>(1 - task.beta_2);
  const float update_rate = static_cast<float>(*task.learning_rate / (1 - std::pow(task.beta_1, *task.step)));
  const float root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(task.beta_2, *task.step)));
  const float epsilon = static_cast<float>(task.epsilon), weight = *task.ema_weight;
  const float rate = *task.learning_rate, decay = rate * static_cast<float>(task.weight_decay);
  const float beta_1 = static_cast<float>(task.beta_1);
  // No two of these overlap, which the compiler cannot see; it would test for it in every block otherwise.
  float* __restrict master = task.master;
  float* __restrict exp_avg = task.exp_avg;
  float* __restrict exp_avg_sq = task.exp_avg_sq;
  float* __restrict ema = task.ema;
  const G* __restrict gradients = static_cast<const G*>(task.gradient);
  W* __restrict weights = static_cast<W*>(task.weights);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = std::min(end, start + kBlock);
    if (task.lion) {
      for (int64_t i = start; i < stop; ++i) {
        const float gradient = widen(gradients[i]) * factor, update = beta_1 * exp_avg[i] + rest_1 * gradient;
        exp_avg[i] = beta_2 * exp_avg[i] + rest_2 * gradient;
        master[i] = master[i] - decay * master[i] - rate * sign(update);
      }
    }
    for (int64_t i = task.lion ? stop : start; i < stop; ++i) {
      const float gradient = widen(gradients[i]) * factor;
      const float first = exp_avg[i] + rest_1 * (gradient - exp_avg[i]);
      const float second = beta_2 * exp_avg_sq[i] + rest_2 * gradient * gradient;
      float value = master[i] - decay * master[i];
      value -= update_rate * first / (std::sqrt(second) * root_correction + epsilon);
      exp_avg[i] = first;
      exp_avg_sq[i] = second;
      master[i] = value;
    }
    // The block is still in the first-level cache.
    if (ema != nullptr) {
      for (int64_t i = start; i < stop; ++i) ema[i] += weight * (master[i] - ema[i]);
    }
    if (weights != nullptr) {
      for (int64_t i = start; i < stop; ++i) narrow(master[i], weights + i);
    }
  }
}

template <typename G>
Task adamw_ema_task_for(int32_t weights_type) {
  const Task tasks[] = {adamw_ema_task<G, float>, adamw_ema_task<G, _Float16>, adamw_ema_task<G, BFloat16>};
  return tasks[weights_type];
}

template <typename T>
int32_t run_loss(DiffusionLoss* task, int32_t mean_type, int64_t blocks, ParallelFor parallel_for) {
  const Task tasks[] = {diffusion_loss_task<T, float>, diffusion_loss_task<T, _Float16>, diffusion_loss_task<T, BFloat16>};
  return parallel_for(0, blocks, kGrain, tasks[mean_type], task);
}

}  // namespace

extern "C" {

// Types: 0 fp32, 1 fp16, 2 bf16. All return 0, or what at::parallel_for's entry point returned.

int32_t add_noise(AddNoise* task, int32_t type, ParallelFor parallel_for) {
  const Task tasks[] = {add_noise_task<float>, add_noise_task<_Float16>, add_noise_task<BFloat16>};
  const Walk& walk = task->walk;
  return parallel_for(0, walk.samples * walk.rows * blocks_of(walk), kGrain, tasks[type], task);
}

int32_t diffusion_loss(DiffusionLoss* task, int32_t type, int32_t mean_type, ParallelFor parallel_for) {
  const Walk& walk = task->walk;
  const int64_t per_sample = walk.rows * blocks_of(walk);
  std::vector<double> partial(static_cast<size_t>(walk.samples * per_sample));
  task->partial = partial.data();
  const decltype(&run_loss<float>) runs[] = {run_loss<float>, run_loss<_Float16>, run_loss<BFloat16>};
  const int32_t failed = runs[type](task, mean_type, walk.samples * per_sample, parallel_for);
  // In a fixed order, so that the number of threads does not show.
  for (int64_t sample = 0; sample < walk.samples; ++sample) {
    double sum = 0;
    for (int64_t block = 0; block < per_sample; ++block) sum += partial[sample * per_sample + block];
    task->loss[sample] = static_cast<float>(sum);
  }
  return failed;
}

int32_t adamw_ema(AdamWEma* task, int32_t gradient_type, int32_t weights_type, ParallelFor parallel_for) {
  if (!(*task->factor > 0)) return 0;
  if (task->rounding != nullptr) {
    const Task tasks[] = {rounded_task<float>, rounded_task<_Float16>, rounded_task<BFloat16>};
    return parallel_for(0, (task->elements + kTile - 1) / kTile, 4, tasks[gradient_type], task);
  }
  constexpr int64_t kElementsPerTurn = 16384;
  decltype(&adamw_ema_task_for<float>) const by_gradient[] = {adamw_ema_task_for<float>, adamw_ema_task_for<_Float16>,
                                                              adamw_ema_task_for<BFloat16>};
  return parallel_for(0, task->elements, kElementsPerTurn, by_gradient[gradient_type](weights_type), task);
}
}
