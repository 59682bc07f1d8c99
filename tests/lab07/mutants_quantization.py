"""Part 2 of Lab 7's solution with one realistic mistake each, the checks each must lose, and what the hint must say."""

from __future__ import annotations

from tests.accuracy import Mutant

_SCALE = "scale = largest / (2 ** (bits - 1) - 1)"
_ROUND = "return scale * (x / scale).round().clamp(-q_max, q_max)"
_STRAIGHT = "return clipped + (fake_quantize(x, scale, bits) - clipped).detach()"
_KEPT = "states = list(ddim_states(model, schedule, x_T, num_steps))[:-1][::every]"
_LARGEST = "[torch.maximum(old.to(x), x.abs().max()) for old, x in zip(largest[name], parts)]"
_ERROR = "errors[name][k, r] += (fake_quantize(x, scale, bits) - x).square().sum()"
_PIECES = "straight_through(part, s, bits) for part, s in zip(x.split(sizes, dim=1), scales)"
_WEIGHT = "straight_through(part, symmetric_scale(part.detach(), self.weight_bits, per_channel=True), self.weight_bits)"
_LAYER = "QuantizedConv2d(conv, scales[name], sizes, weight_bits, activation_bits)"

MUTANTS = [
    # -- one tensor
    Mutant("one integer too many", "symmetric_scale", _SCALE, "scale = largest / 2 ** (bits - 1)",
           {"symmetric_scale": "one too many"}),
    Mutant("all integers positive", "symmetric_scale", _SCALE, "scale = largest / (2**bits - 1)",
           {"symmetric_scale": "twice too many"}),
    Mutant("largest, not largest absolute", "symmetric_scale", "if per_channel else x.abs().max()",
           "if per_channel else x.max()", {"symmetric_scale": "not the largest absolute value"}),
    Mutant("channels not told apart", "symmetric_scale", "largest = x.abs().amax(dim=tuple(range(1, x.ndim)), "
           "keepdim=True) if per_channel else x.abs().max()",
           "largest = x.abs().max()\n    if per_channel:\n        largest = largest.expand(len(x), *[1] * (x.ndim - 1))",
           {"symmetric_scale": "one scale for all channels"}),
    Mutant("channel dimensions dropped", "symmetric_scale", "keepdim=True", "keepdim=False",
           {"symmetric_scale": "shape", "quantized_conv": "RuntimeError", "quantize_model": "RuntimeError"}),
    Mutant("a scale of zero", "symmetric_scale", "return torch.where(largest > 0, scale, torch.ones_like(scale))",
           "return scale", {"symmetric_scale": "all zero should be 1"}),
    Mutant("NaN accepted", "symmetric_scale", "if not bool(x.isfinite().all()):", "if False:",
           {"symmetric_scale": "holds NaN"}),
    Mutant("infinity accepted", "symmetric_scale", "x.isfinite().all()", "(~x.isnan()).all()",
           {"symmetric_scale": "infinite value"}),
    Mutant("one bit accepted", "symmetric_scale", "if bits < 2:", "if bits < 1:", {"symmetric_scale": "bits = 1"}),
    Mutant("not clipped", "fake_quantize", _ROUND, "q_max = q_max\n    return scale * (x / scale).round()",
           {"fake_quantize": "missing clip"}),
    Mutant("two's complement", "fake_quantize", "clamp(-q_max, q_max)", "clamp(-q_max - 1, q_max)",
           {"fake_quantize": "one integer too far"}),
    Mutant("rounded down", "fake_quantize", ".round()", ".floor()", {"fake_quantize": "rounding down"}),
    Mutant("left as integers", "fake_quantize", "return scale * (x", "return (x", {"fake_quantize": "not multiplied"}),
    Mutant("clipped at values", "fake_quantize", "clamp(-q_max, q_max)", "clamp(-q_max * scale, q_max * scale)",
           {"fake_quantize": "bounds that are values"}),
    Mutant("no gradient", "straight_through", _STRAIGHT, "return fake_quantize(x, scale, bits)",
           {"straight_through": "zero everywhere"}),
    Mutant("gradient everywhere", "straight_through", _STRAIGHT,
           "return x + (fake_quantize(x, scale, bits) - x).detach()", {"straight_through": "passes outside the range"}),
    Mutant("detached the other way", "straight_through", _STRAIGHT,
           "return clipped.detach() + fake_quantize(x, scale, bits) - clipped.detach()",
           {"straight_through": "zero everywhere"}),
    Mutant("not rounded forward", "straight_through", _STRAIGHT, "return clipped",
           {"straight_through": "no rounding"}),
    # -- calibration
    Mutant("the samples among the states", "calibration_set", "[:-1][::every]", "[::every]",
           {"calibration_set": "t = −1"}),
    Mutant("starts late", "calibration_set", "[::every]", "[every - 1 :: every]",
           {"calibration_set": "start with the first"}),
    Mutant("every state", "calibration_set", "[:-1][::every]", "[:-1]", {"calibration_set": "shape"}),
    Mutant("noise at every timestep", "calibration_set", "torch.cat([x for x, _ in states])",
           "torch.cat([x_T for _ in states])", {"calibration_set": "x_T at every timestep"}),
    Mutant("a timestep for each state", "calibration_set", "torch.cat([torch.full((len(x),), t) for x, t in states])",
           "torch.tensor([t for _, t in states])", {"calibration_set": "shape"}),
    Mutant("timesteps in another order", "calibration_set", "torch.cat([torch.full((len(x),), t) for x, t in states])",
           "torch.tensor([t for _, t in states]).repeat(len(x_T))", {"calibration_set": "one state after the other"}),
    Mutant("a single image accepted", "calibration_set", "if len(x_T) < 2:", "if len(x_T) < 1:",
           {"calibration_set": "single trajectory"}),
    Mutant("a step too many", "calibration_set", "for _ in range(step):", "for _ in range(step + 1):",
           {"calibration_set": "one_timestep_set"}),
    Mutant("the whole trajectory for one state", "calibration_set", "states = ddim_states(model, schedule, x_T, num_steps)"
           "\n    for", "states = iter(list(ddim_states(model, schedule, x_T, num_steps)))\n    for",
           {"calibration_set": "exactly 0 network calls"}),
    Mutant("last batch's range", "activation_scales", _LARGEST, "[x.abs().max() for x in parts]",
           {"activation_scales": "last batch"}),
    Mutant("never clipped", "activation_scales", "scales[int(error.argmin())]", "scales[-1] + 0 * error[0]",
           {"activation_scales": "never clipped"}),
    Mutant("last batch's errors", "activation_scales", "[k, r] += ", "[k, r] = ", {"activation_scales": "last batch alone"}),
    Mutant("absolute errors", "activation_scales", ".square().sum()", ".abs().sum()",
           {"activation_scales": "absolute errors"}),
    Mutant("worst for best", "activation_scales", "error.argmin()", "error.argmax()", {"activation_scales": "off by"}),
    Mutant("halves together", "activation_scales", "pieces = input_pieces(network, split)",
           "pieces = input_pieces(network, False)", {"activation_scales": "list of as many scales", "quantize_model": "ValueError"}),
    # -- quantized layers and networks
    Mutant("one scale for both", "fake_quantize_split", _PIECES,
           "straight_through(part, scales[0], bits) for part in x.split(sizes, dim=1)",
           {"fake_quantize_split": "first scale for all"}),
    Mutant("scales in reverse", "fake_quantize_split", "scales)]", "scales[::-1])]",
           {"fake_quantize_split": "wrong order"}),
    Mutant("sizes not held", "fake_quantize_split", "if sum(sizes) != x.shape[1] or len(scales) != len(sizes):", "if False:",
           {"fake_quantize_split": "should raise a ValueError"}),
    Mutant("weights per tensor", "quantized_conv", "per_channel=True", "per_channel=False",
           {"quantized_conv": "one scale for all output channels"}),
    Mutant("weights not rounded", "quantized_conv", _WEIGHT, "part", {"quantized_conv": "weights that are not rounded"}),
    Mutant("weights without gradient", "quantized_conv", "straight_through(part,", "fake_quantize(part,",
           {"quantized_conv": "no gradient reaches the weights"}),
    Mutant("input not rounded", "quantized_conv",
           "x = fake_quantize_split(x, self.scales, self.sizes, self.activation_bits)", "pass",
           {"quantized_conv": "an input that is not rounded"}),
    Mutant("weights not cut", "quantized_conv", "self.conv.weight.split(self.sizes, dim=1)", "[self.conv.weight]",
           {"quantized_conv": "not cut into pieces"}),
    Mutant("bits exchanged", "quantized_conv", "symmetric_scale(part.detach(), self.weight_bits, per_channel=True), self.weight_bits)",
           "symmetric_scale(part.detach(), self.activation_bits, per_channel=True), self.activation_bits)",
           {"quantized_conv": "the activations' bits"}),
    Mutant("bias left out", "quantized_conv", "self.conv.bias", "None", {"quantized_conv": "missing bias"}),
    Mutant("stride left out", "quantized_conv", "self.conv.stride", "1",
           {"quantized_conv": "RuntimeError", "quantize_model": "RuntimeError"}),
    Mutant("no copy", "quantize_model", "copy.deepcopy(model)", "model", {"quantize_model": "deepcopy"}),
    Mutant("everything quantized", "quantize_model", "    return quantized",
           "    for end in ('conv_in', 'conv_out'):\n"
           "        conv = quantized.get_submodule(end)\n"
           "        conv.weight.data = fake_quantize(\n"
           "            conv.weight.data, symmetric_scale(conv.weight.data, weight_bits, True), weight_bits)\n"
           "    return quantized", {"quantize_model": "conv_in and conv_out"}),
    Mutant("bits of the network exchanged", "quantize_model", "weight_bits, activation_bits)\n        setattr",
           "activation_bits, weight_bits)\n        setattr",
           {"quantize_model": "exchanged in the layers"}),
    Mutant("never split", "quantize_model", "scales = activation_scales(model, calibration, activation_bits, split)\n",
           "split = False\n    scales = activation_scales(model, calibration, activation_bits, split)\n",
           {"quantize_model": "the other choice of split"}),
    Mutant("attention left out", "quantize_model", "        parent, _, child",
           "        if 'attention' in name:\n            continue\n        parent, _, child",
           {"quantize_model": "attention stays float"}),
    Mutant("nothing replaced", "quantize_model", "setattr(quantized.get_submodule(parent), child, layer)",
           "setattr(copy.deepcopy(quantized).get_submodule(parent), child, layer)",
           {"quantize_model": "the float network"}),
    # -- size, training
    Mutant("scales not counted", "model_bytes", " + 4 * scales", " + 0 * scales", {"model_bytes": "scales left out"}),
    Mutant("input scales not counted", "model_bytes", "(len(weight) + 1)", "len(weight)",
           {"model_bytes": "scales of the inputs"}),
    Mutant("activation bits counted", "model_bytes", "layer.weight_bits", "layer.activation_bits",
           {"model_bytes": "activation_bits in place"}),
    Mutant("bytes rounded down", "model_bytes", "math.ceil(weight.numel() * layer.weight_bits / 8)",
           "weight.numel() * layer.weight_bits // 8", {"model_bytes": "rounded down"}),
    Mutant("bits for bytes", "model_bytes", "layer.weight_bits / 8", "layer.weight_bits", {"model_bytes": "bits in place"}),
    Mutant("gradients not wanted", "finetune_quantized", "quantized.requires_grad_(True)", "pass",
           {"finetune_quantized": "RuntimeError"}),
    Mutant("no step", "finetune_quantized", "optimizer.step()", "pass", {"finetune_quantized": "as it is"}),
    Mutant("uphill", "finetune_quantized", "loss.backward()", "(-loss).backward()", {"finetune_quantized": "should bring"}),
    Mutant("the noise for a target", "finetune_quantized", "target = teacher(x_t, t)", "target = torch.randn_like(x_t)",
           {"finetune_quantized": "first loss"}),
    Mutant("sum of squares", "finetune_quantized", "F.mse_loss(quantized(x_t, t), target)",
           'F.mse_loss(quantized(x_t, t), target, reduction="sum")', {"finetune_quantized": "first loss"}),
    Mutant("the teacher trained", "finetune_quantized", "torch.optim.Adam(quantized.parameters(), lr=lr)",
           "torch.optim.Adam([*quantized.parameters(), *teacher.requires_grad_(True).parameters()], lr=lr)\n"
           "    teacher.conv_in.weight.data += 0.01", {"finetune_quantized": "changed the teacher"}),
    Mutant("a single loss", "finetune_quantized", "return losses", "return losses[-1]", {"finetune_quantized": "list of 40"}),
]  # fmt: skip
