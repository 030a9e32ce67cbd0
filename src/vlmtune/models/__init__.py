"""Model families. Importing this package makes transformers' Auto classes know the classes that are our own."""

from transformers import AutoConfig, AutoModelForCausalLM

from vlmtune.models.xcomposer2.configuration import MODEL_TYPE, XComposer2Config
from vlmtune.models.xcomposer2.model import XComposer2ForConditionalGeneration

AutoConfig.register(MODEL_TYPE, XComposer2Config)
AutoModelForCausalLM.register(XComposer2Config, XComposer2ForConditionalGeneration)
