"""Image-text foundation models for skin lesions, pretrained on synthesized clinical notes."""
