"""Attributes of a lesion measured from the pixels, by classical methods with sources, each with a confidence."""
