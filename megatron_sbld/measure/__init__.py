"""Measuring the sensitivity of each layer."""
