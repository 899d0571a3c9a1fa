"""What a step of training does, and the files of a run."""
