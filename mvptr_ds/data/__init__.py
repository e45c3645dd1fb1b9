"""From shards to batches, in eight steps. One record of a shard as an example:

    KEY.json  {"image_id": "42", "width": 640, "height": 480,
               "captions": [{"text": "A brown dog.",
                             "phrases": [{"tuple": ["dog", "brown"], "spans": [[8, 11], [2, 7]]}]}],
               "regions": [{"box": [96, 120, 352, 468], "tag": "dog", "score": 0.9}]}
    KEY.npy   float16 [1, 1024], the detector's features of the region

Step 1, once a folder: `shards.index_builder.build_index` checks every record and writes `index.npy`, one row a record.

    row 7: block 1203, 8 blocks, first sample 7, hash of KEY       a caption is a sample: this record has one

Step 2: `sampling.batches.Batches.positions` gives this rank its positions of a micro-batch (`sampling.buckets` draws
batches of samples of about equal lengths).

    step 3, rank 0 of 2, batch of 8 -> positions 24 25 26 27

Step 3: `sampling.plan.Plan.samples_at` tells which sample stands at each position. With several sources
`sampling.mixture.Mixture.places_at` first tells the source, and the position within it.

    position 25 -> epoch 0, sample 7

Step 4: `shards.index.Index.locate` finds the record of the sample in the mapped index.

    sample 7 -> shard-000000.tar, byte 615,936, 4,096 bytes, caption 0

Step 5: `shards.tar_reader.read_record` reads these bytes, from a file or ahead of time from a URL (`read_ahead`), and
splits them into members. `shards.sidecar_join.JoinedIndex.read` merges those of sidecars into them.

    {"json": b"...", "npy": b"..."}

Step 6: `schema.parse_sample_record` checks the json member and makes a `Record` with the caption of the sample.

Step 7: `features.SampleBuilder` makes a masked `Sample` of it, with generators keyed by (seed, epoch, position).
`begin` tokenises (`wordpiece`), chooses phrases (`caption_phrases`), lays them out (`sequence_layout`) and masks
(`masking`); `add_visual` adds the features, or the image (`images`).

    text      [CLS] a brown [MASK] . [MASK] [SEP]    "dog" was picked, so its phrase (dog, brown) is hidden, too
    tags      [CLS] dog [SEP]
    regions   6 numbers of geometry and 1024 features

A record that cannot be used is replaced by another one, counted and reported (`dataset.ShardDataset.load`).

Step 8: `collate.collate` pads the samples of the micro-batch to a `Batch`. `sharing.SentBatch` carries it from the
loader process to the rank, where the DataLoader of `loader.make_loader` returns it. Training packs it first, still in
the loader process (`objectives/batch_plan.py`), and `on_device.BatchesOnDevice` copies it a step ahead.
"""
