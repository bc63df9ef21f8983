"""The way in and out: conversion of other checkpoints, new models on published towers."""

from medmoe_hf.hub.checkpoint_files import ConvertError, read_checkpoint, read_state_dict
from medmoe_hf.hub.convert import LoadReport, convert_medclip, convert_official, init_model

__all__ = [
    "ConvertError",
    "LoadReport",
    "convert_medclip",
    "convert_official",
    "init_model",
    "read_checkpoint",
    "read_state_dict",
]
