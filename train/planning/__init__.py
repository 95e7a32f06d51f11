"""Plans a run before it is paid for: compiles its programs for absent devices and costs them."""
