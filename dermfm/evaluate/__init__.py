"""Scoring of checkpoints: embeddings once, then exact metrics per data set and partition with intervals."""
