"""Configs of converted models: transformers' own, with the records of effconvert."""

from typing import Any

import transformers

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import decode, encode, read
from effconvert.surgery._placed import check_replaced

PARSED = "_effconvert"  # the attribute of a transformers config that caches our own


class ConvertedConfig:
    """Mixin for configs of converted models. The key `effconvert` has their records: replaced places, and shared KV heads."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config from the content of config.json."""
        own = Config(*read({"model_type": cls.model_type, **config_dict}))  # type: ignore[attr-defined]
        check_replaced(own)
        records = {key: config_dict[key] for key in ("effconvert", "auto_map") if key in config_dict}
        return super().from_dict({**own.raw, **records}, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return encode(*decode(_plain(self)))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the config of what reads text; of an encoder or a decoder alone in transformers' class, which writes one's keys over the other's."""
        ours = own_config(self)
        if not ours.encoder_decoder or decoder == encoder:
            return super().get_text_config(decoder, encoder)  # type: ignore[misc]
        return type(transformers.AutoConfig.for_model(ours.kind)).from_dict(dict(ours.raw)).get_text_config(decoder, encoder)


def own_config(config: Any) -> Config:
    """Return our config of a transformers config. It is parsed once, and cached on the object if that is of our class: stock ones would save it."""
    own: Config | None = config.__dict__.get(PARSED)
    if own is None:
        own = Config(*decode(_plain(config)))
        if isinstance(config, ConvertedConfig):
            config.__dict__[PARSED] = own
    return own


def _plain(config: Any) -> dict[str, Any]:
    """Return the content of a transformers config without ours."""
    parsed = config.__dict__.pop(PARSED, None)
    try:
        stock: Any = super(ConvertedConfig, config) if isinstance(config, ConvertedConfig) else config
        content: dict[str, Any] = stock.to_dict()
        return content
    finally:
        if parsed is not None:
            config.__dict__[PARSED] = parsed
