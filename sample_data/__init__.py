"""Synthetic raw data for the demo and the tests."""
