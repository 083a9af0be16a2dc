"""Tests; those marked `gpu` compute on `DEVICE`: `make gpu` sets it."""

import os

DEVICE = os.environ.get("DEVICE", "cpu")
