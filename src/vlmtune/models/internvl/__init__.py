"""InternVL 1.5 to 3.5: official folders (`InternVLChatModel`) and native ones (`-hf`)."""

from vlmtune.models.internvl.family import InternVLFamily as InternVLFamily
