"""The way in and out: conversion of other checkpoints, new models on published towers, publishing."""

from medmoe_hf.hub.checkpoint_files import ConvertError, read_checkpoint, read_state_dict
from medmoe_hf.hub.convert import LoadReport, convert_medclip, convert_official, init_model
from medmoe_hf.hub.folder_checks import PublishError, check_folder
from medmoe_hf.hub.golden import write_golden
from medmoe_hf.hub.publish import PublishReport, VerifyReport, publish, verify

__all__ = [
    "ConvertError",
    "LoadReport",
    "PublishError",
    "PublishReport",
    "VerifyReport",
    "check_folder",
    "convert_medclip",
    "convert_official",
    "init_model",
    "publish",
    "read_checkpoint",
    "read_state_dict",
    "verify",
    "write_golden",
]
