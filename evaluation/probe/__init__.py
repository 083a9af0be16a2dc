"""Prompts, answers to them, and what is measured of these."""
