"""Encoding of images and texts, by MedMoE and by other models."""
