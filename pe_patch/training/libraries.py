"""Import OmegaConf, which reads recipes; if it is missing, the error says which extra installs it."""

from ..compat import require_extra

try:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ImportError:
    require_extra("train")
    raise

__all__ = ["DictConfig", "OmegaConf", "OmegaConfBaseException"]
