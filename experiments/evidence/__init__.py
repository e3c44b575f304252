"""Does the measured noise scale predict the best batch size? From rows to judged predictions and a page."""
