"""effconvert turns a pretrained Hugging Face checkpoint into a cheaper architecture and proves what it cost."""

__version__ = "0.1.0"
