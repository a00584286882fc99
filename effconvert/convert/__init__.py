"""The stages of a conversion: plan, calibrate, write, output folder, verify. The package is callable: `effconvert.convert(...)` is `effconvert.api.convert`."""
