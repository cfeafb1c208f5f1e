"""Variants of low-rank adaptation: one file and one row of `table.py` each.

rslora     a scale of alpha / sqrt(r)                                      LoraSpec(scaling="rslora")
dora       length and direction of each column apart                       LoraSpec(variant="dora")
lora_fa    A frozen                                                        LoraSpec(variant="lora-fa")
vera       random factors shared by all layers, trained diagonals          LoraSpec(variant="vera")
pissa      start at the principal part of the weight                       LoraSpec(init="pissa" | "pissa-fast")
milora     start at the minor part of the weight                           LoraSpec(init="milora" | "milora-fast")
olora      start at the QR decomposition of the weight                     LoraSpec(init="olora")
eva        start at the directions of the inputs, ranks by variance        LoraSpec(init="eva")
loraplus   a higher learning rate for B                                    lorax.lora_plus(tx, ratio)

LoftQ, a start that makes up for quantisation, is `lorax.loftq`.
"""
