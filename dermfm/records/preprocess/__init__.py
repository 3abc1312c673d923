"""Preprocessing of images: decode whatever a publisher ships, cut frames off, remove hair, make squares, resize."""
