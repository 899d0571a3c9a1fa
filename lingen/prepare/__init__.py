"""What makes, inspects and encodes shards before anything is trained."""
