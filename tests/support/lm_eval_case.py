"""What the tests of lm-eval's adapter and of its runs share."""

DOCUMENT = "The mill was built in 1783. " * 60  # long enough to be worth sharing
