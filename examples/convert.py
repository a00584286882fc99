"""Convert a model in Python: keep 2 of 8 KV heads, refit, and print what that cost. Run it from the repository's root."""

import effconvert

outcome = effconvert.convert(
    "effconvert/demo/model",
    {"gqa": {"groups": 2}},
    "refit",
    output="converted",
    calibration_tokens=1024,
    tokens=1024,
)
before, after = outcome.report.before, outcome.report.after
print(f"cache: {before.kv_bytes} -> {after.kv_bytes} bytes a token")
print(f"perplexity: {before.quality.perplexity:.1f} -> {after.quality.perplexity:.1f}")
