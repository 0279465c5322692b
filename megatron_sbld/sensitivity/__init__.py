"""Sensitivity of the layers: the file that holds it, and the Block and Allow lists that follow from it."""
