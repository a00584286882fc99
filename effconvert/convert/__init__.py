"""One conversion: plan, calibrate, write, output folder, verify. Called itself, `effconvert.convert(...)`, it converts: see `effconvert.api.convert`."""
