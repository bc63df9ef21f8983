"""Conversion of other checkpoints, new models on published encoders, export, publishing."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.errors import ConvertError as ConvertError
    from medmoe_hf.errors import PublishError as PublishError
    from medmoe_hf.hub.checkpoint_files import read_checkpoint as read_checkpoint
    from medmoe_hf.hub.checkpoint_files import read_state_dict as read_state_dict
    from medmoe_hf.hub.convert import convert_medclip as convert_medclip
    from medmoe_hf.hub.convert import convert_official as convert_official
    from medmoe_hf.hub.folder_checks import check_folder as check_folder
    from medmoe_hf.hub.golden import write_golden as write_golden
    from medmoe_hf.hub.half_precision import ShrinkReport as ShrinkReport
    from medmoe_hf.hub.half_precision import shrink as shrink
    from medmoe_hf.hub.new_model import init_model as init_model
    from medmoe_hf.hub.publishing import PublishReport as PublishReport
    from medmoe_hf.hub.publishing import VerifyReport as VerifyReport
    from medmoe_hf.hub.publishing import publish as publish
    from medmoe_hf.hub.publishing import verify as verify
    from medmoe_hf.hub.weight_mapping import LoadReport as LoadReport

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.errors": ["ConvertError", "PublishError"],
        "medmoe_hf.hub.checkpoint_files": ["read_checkpoint", "read_state_dict"],
        "medmoe_hf.hub.convert": ["convert_medclip", "convert_official"],
        "medmoe_hf.hub.folder_checks": ["check_folder"],
        "medmoe_hf.hub.golden": ["write_golden"],
        "medmoe_hf.hub.half_precision": ["ShrinkReport", "shrink"],
        "medmoe_hf.hub.new_model": ["init_model"],
        "medmoe_hf.hub.publishing": ["PublishReport", "VerifyReport", "publish", "verify"],
        "medmoe_hf.hub.weight_mapping": ["LoadReport"],
    },
)
