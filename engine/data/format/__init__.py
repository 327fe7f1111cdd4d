"""The latent shard format: writing, reading and verifying. Described for other readers in docs/shards.md.

A directory holds `index.json` and `shard-00000.safetensors` ... Each shard covers a range of source samples and stores, per
field of the family's record, one contiguous tensor [rows, ...]. Fields of an image have a row per stored variant (crops,
flips); fields of a caption have a row per distinct caption, stored in the shard where it first appears. Four more tensors
tie rows to records:

    source           int64 [records]      which source sample each record came from
    image_offsets    int64 [records + 1]  record r has image rows image_offsets[r] .. image_offsets[r + 1] - 1 of this shard
    caption_offsets  int64 [records + 1]  and captions caption_numbers[caption_offsets[r] : caption_offsets[r + 1]]
    caption_numbers  int64 [...]          a caption's number over all shards; each shard holds a consecutive range of them
"""
