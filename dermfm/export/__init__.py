"""A trained model as a folder that stands alone: weights, configuration, processor, notes to retrieve, model card."""
