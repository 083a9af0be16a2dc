"""Ask models, measure their answers, and compare them."""
