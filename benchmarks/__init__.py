"""What `bin/bench` times, and the programs and results behind docs/performance.md. Not part of the package."""
