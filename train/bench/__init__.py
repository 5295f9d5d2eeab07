"""Speed: `zoo bench MODEL...`, and `zoo bench` with ops, heads, linear, gpu or train."""
