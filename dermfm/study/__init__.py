"""The study: which way of writing notes helps, and does it help beyond the label? See `dermfm.study.run`."""
