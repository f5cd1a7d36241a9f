"""Wrong answers to the exercises of chapter 7, each with words that its verdict must contain."""


def _name(norms="", mlp="", head=""):
    lines = [
        "import re",
        "def my_name(name):",
        norms or r"    name = re.sub(r'(trans_\d+|trans_block)\.norm', r'\1.ln', name)",
        mlp
        or "    name = name.replace('.mlp.fc1.', '.ffn.layers.0.0.')"
        ".replace('.mlp.fc2.', '.ffn.layers.1.')",
        head or "    return ('head.' if '_cls_head' in name else 'backbone.') + name",
    ]
    return "\n".join(lines)


_FAULTY = _name(
    norms="    name = name.replace('norm', 'ln')",
    mlp="    name = name.replace('.fc1.', '.ffn.layers.0.').replace('.fc2.', '.ffn.layers.1.')",
    head="    return 'backbone.' + name",
)

_DIFFERENCES = """
def my_differences(own, theirs):
    theirs = {{{strip}: tensor for name, tensor in theirs.items()}}
    missing = [name for name in own if name not in theirs]
    spare = [name for name in theirs if name not in own]
    both = [name for name in own if name in theirs]
    misshaped = [name for name in both if {differ}]
    return {result}
"""


def _differences(
    strip="name.removeprefix('module.')",
    differ="own[name].shape != theirs[name].shape",
    result="(missing, spare, misshaped)",
):
    return _DIFFERENCES.format(strip=strip, differ=differ, result=result)


def _predict(result):
    return f"def my_prediction():\n    return {result}\n"


_NAME = "'trans_patch_conv.weight'"

WRONG = {
    "check_name": [
        (_FAULTY, "trans_norm keeps its name"),
        (_FAULTY, "fc1 is ffn.layers.0.0"),
        (_FAULTY, "the names of the heads start with head., not backbone."),
        (_name(norms="    pass"), "norm1 and norm2 of a transformer block are ln1 and ln2"),
        (_name(norms="    name = name.replace('norm', 'ln')"), "trans_norm keeps its name"),
        (_name(mlp="    name = name.replace('.fc1.', '.ffn.layers.0.0.')"), "the word mlp goes"),
        (_name(mlp="    name = name.replace('.mlp.fc1.', '.ffn.layers.0.0.')"), "fc2 is ffn"),
        (_name(head="    return 'head.' + name"), "all but the heads start with backbone."),
        (
            _name(head="    return name"),
            "backbone. is missing in front",
        ),
        (_name(norms="    name = name.replace('ln.', 'norm.')"), "squeeze_block.ln"),
        (_name(head="    return name, 1"), "return a name, a str, not a tuple"),
    ],
    "check_differences": [
        (_differences(result="(spare, missing, misshaped)"), "missing and spare are exchanged"),
        (_differences(result="(missing, spare, [])"), "(3,) and (4,) are not told apart"),
        (_differences(differ="own[name].numel() != theirs[name].numel()"), "as many numbers"),
        (_differences(differ="len(own[name].shape) != len(theirs[name].shape)"), "told apart"),
        (_differences(strip="name"), "module. in front"),
        (_differences(strip="name.replace('module.', '')"), "strip one module. at the front"),
        (_differences(result="(missing, spare)"), "return three lists of names"),
        (_differences(result="(missing, [], misshaped)"), "spare is []"),
        (_differences(result="([], spare, misshaped)"), "missing is []"),
        (_differences(result="(missing, spare, both)"), "differs from itself"),
        (_differences(result="(missing, spare, missing)"), "no shape differs"),
    ],
    "check_prediction": [
        (_predict(f"{{{_NAME}, 'trans_patch_conv.bias'}}, 1"), "whatever the kernel"),
        (_predict(f"{{{_NAME}, 'cls_token'}}, 1"), "belongs to no patch"),
        (
            _predict(f"{{{_NAME}, 'conv_trans_2.squeeze_block.conv_project.weight'}}, 1"),
            "the convolutions of the coupling are 1 x 1",
        ),
        (_predict(f"{{{_NAME}, 'pos_embed'}}, 1"), "no positional embedding"),
        (_predict(f"{{{_NAME}, 'conv1.weight'}}, 1"), "its shape does not change"),
        (_predict(f"{{{_NAME}, 'entry.token_embed.proj.weight'}}, 1"), "no such name"),
        (_predict("set(), 1"), "which layer is as large as a patch"),
        (_predict(f"{{{_NAME}}}, -1_179_648"), "not fewer"),
        (_predict(f"{{{_NAME}}}, 1_572_864"), "subtract the one at 16"),
        (_predict(f"{{{_NAME}}}, 384 * 64 * (32**2 - 16**2)"), "not pixels"),
        (_predict(f"{{{_NAME}}}, 384 * 3 * (32**2 - 16**2)"), "not the image's 3"),
        (_predict(f"{{{_NAME}}}, 384 * 3 * (64 - 16)"), "not 3"),
        (_predict(f"{{{_NAME}}}, 384 * 64 * 4"), "each of two directions"),
        (_predict(f"{{{_NAME}}}, 7"), "7 is wrong"),
        (_predict(f"{{{_NAME}}}, 1179648.0"), "return a whole number"),
        (_predict("7"), "return a set of names and a number"),
        (_predict("7, 7"), "names as a set of strings"),
    ],
}
