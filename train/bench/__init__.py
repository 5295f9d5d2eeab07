"""Speed: `zoo bench ops`, `zoo bench heads`, `zoo bench MODEL`."""
