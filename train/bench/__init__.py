"""Speed: `zoo bench MODEL...`, and `zoo bench` with ops, heads, linear, claims, gpu or train."""
