"""Other tools on our folders: slow tests, which `make elsewhere` runs with what they need."""
