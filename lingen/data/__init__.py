"""What training reads: shards, their manifest, the order of samples, decoding, buckets, the ledger, the data module."""
