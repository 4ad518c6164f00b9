#include "plan_export.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <set>
#include <sstream>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "kvmix/version.h"

namespace kvmix::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kColumns = 100;

// A type of another engine's cache.
struct Type {
  const char* name;
  std::size_t holds;         // storages of the plan up to so many bits
  double bits;               // a number with its share of the scales
  std::size_t multiple = 1;  // what head_dim must be a multiple of
};
using Types = std::vector<Type>;  // by rising bits; the last holds all

const Type kF16{"f16", 16, 16.0};
const Types kLlamaTypes = {{"q4_0", 4, 4.5, 32}, {"q8_0", 8, 8.5, 32}, kF16};
const Types kIkTypes = {{"q4_0", 4, 4.5, 32}, {"q6_0", 6, 6.5, 32}, {"q8_0", 8, 8.5, 32}, kF16};
// Bits without the scales, which a group of channels shares.
const Types kOpenVinoTypes = {{"u4", 4, 4.0}, {"u8", 8, 8.0}, kF16};
constexpr double kOpenVinoGroupBits = 64.0;  // a scale and a zero point, f32 both
const Types kOptimizerTypes = {{"NVFP4", 4, 4.5, 16}, {"FP8", 8, 8.0}, kF16};

const Type& Least(const Types& types, std::size_t bits, std::size_t dim) {
  return *std::ranges::find_if(
      types, [&](const Type& t) { return t.holds >= bits && dim % t.multiple == 0; });
}

// K or V of one layer: the least type that holds its most demanding head.
struct LayerNeed {
  std::size_t layer = 0, numbers = 0;  // of a token
  std::size_t type = 0;                // place in the types
};

// The layers that own K and V.
std::vector<LayerNeed> Needs(const Plan& plan, Tensor t, const Types& types) {
  std::vector<LayerNeed> needs;
  for (std::size_t layer = 0; layer < plan.model.layers.size(); ++layer) {
    const LayerShape& shape = plan.model.layers[layer];
    if (!shape.owns_kv()) continue;
    std::size_t bits = 0;
    for (std::size_t head = 0; head < shape.kv_heads; ++head)
      bits = std::max(bits, BitsOf(plan.codec(layer, head, t).kind.storage));
    const Type& type = Least(types, bits, shape.dim(t));
    needs.push_back(
        {layer, shape.kv_heads * shape.dim(t), static_cast<std::size_t>(&type - types.data())});
  }
  return needs;
}

// One type for K or V of all layers.
struct OneForAll {
  const Type* type;
  double numbers;      // of a token
  std::string raised;  // "1 of 3 layers need less than this for K"
};

OneForAll ForAllLayers(const Plan& plan, Tensor t, const Types& types) {
  const std::vector<LayerNeed> needs = Needs(plan, t, types);
  const std::size_t most = std::ranges::max(needs, {}, &LayerNeed::type).type;
  std::size_t numbers = 0, less = 0;
  for (const LayerNeed& need : needs) {
    numbers += need.numbers;
    less += need.type < most;
  }
  return {&types[most], static_cast<double>(numbers),
          fmt::format("{} of {} layers need less than this for {}", less, needs.size(),
                      t == KVMIX_K ? 'K' : 'V')};
}

// One type for the first layers, one for the last, one for those between.
struct Split {
  std::size_t first_layers = 0, last_layers = 0;  // of the model's
  std::size_t first = 0, middle = 0, last = 0;    // places in the types
  double bits = 0.0;                              // of a token
  std::size_t parts = 1, apart = 0;               // layers outside the middle
};

// The split of least bits, of equals the one with the fewest parts, then with the most layers in
// the middle.
Split BestSplit(const std::vector<LayerNeed>& needs, const Types& types, std::size_t layers) {
  const std::size_t n = needs.size();
  std::vector<Split> splits;
  for (std::size_t first = 0; first < n; ++first) {
    for (std::size_t last = 0; first + last < n; ++last) {
      Split split{.first_layers = first == 0 ? 0 : needs[first - 1].layer + 1,
                  .last_layers = last == 0 ? 0 : layers - needs[n - last].layer,
                  .parts = 1 + std::size_t{first > 0} + std::size_t{last > 0},
                  .apart = first + last};
      const auto part = [&](std::size_t from, std::size_t to) {  // its type
        std::size_t type = 0, numbers = 0;
        for (std::size_t i = from; i < to; ++i) {
          type = std::max(type, needs[i].type);
          numbers += needs[i].numbers;
        }
        split.bits += static_cast<double>(numbers) * types[type].bits;
        return type;
      };
      split.first = part(0, first);
      split.middle = part(first, n - last);
      split.last = part(n - last, n);
      splits.push_back(split);
    }
  }
  return std::ranges::min(splits, {},
                          [](const Split& s) { return std::tuple(s.bits, s.parts, s.apart); });
}

// Heads whose K or V takes a step.
std::size_t Count(const Plan& plan, Tensor t, bool CodecKind::*step) {
  std::size_t n = 0;
  for (std::size_t i = static_cast<std::size_t>(t); i < plan.codecs.size(); i += 2)
    n += plan.codecs[i].kind.*step;
  return n;
}

// Lists what the plan has and the engine does not.
std::vector<std::string> Notes(const Plan& plan, const std::string& engine, double saved,
                               bool rotates) {
  const std::size_t heads = plan.codecs.size() / 2;
  std::vector<std::string> notes;
  if (const std::size_t n = Count(plan, KVMIX_K, &CodecKind::centre); n > 0)
    notes.push_back(fmt::format(
        "WARNING: {} of {} K heads are centred in the plan, and {} does not centre. Where keys "
        "have a bias, as in Qwen2 and Qwen2.5, whatever is below f16 then costs far more: in "
        "llama.cpp q4_0 raises the perplexity of Qwen2.5-1.5B from 13.15 to 2206, and q8_0's KL is "
        "1.0e-3 where a plan's of the same size is 5.9e-5. Measure before you serve.",
        n, heads, engine));
  if (!rotates &&
      Count(plan, KVMIX_K, &CodecKind::hadamard) + Count(plan, KVMIX_V, &CodecKind::hadamard))
    notes.push_back(
        fmt::format("WARNING: the plan's codes are of rotated rows, and {} does not "
                    "rotate: the same bits cost more accuracy.",
                    engine));
  const std::pair<const char*, bool CodecKind::*> steps[] = {{"folded", &CodecKind::fold},
                                                             {"noise-shaped", &CodecKind::shape}};
  for (const auto& [name, step] : steps)
    if (const std::size_t n = Count(plan, KVMIX_K, step) + Count(plan, KVMIX_V, step); n > 0)
      notes.push_back(fmt::format("{} of {} K and V are {} in the plan, and not in {}.", n,
                                  2 * heads, name, engine));
  const auto fits = [](const LayerShape& s) { return s.k_dim % 32 == 0 && s.v_dim % 32 == 0; };
  if (engine.ends_with("llama.cpp") && !std::ranges::all_of(plan.model.layers, fits))
    notes.push_back(fmt::format(
        "{} stores blocks of 32 channels: a head_dim that is no multiple of 32 stays f16.",
        engine));
  if (plan.exact_first > 0)
    notes.push_back(fmt::format("The plan keeps the first {} tokens in f16, {} does not.",
                                plan.exact_first, engine));
  notes.push_back(fmt::format("A token takes {:.2f} % less than in fp16, in the plan {:.2f} %.",
                              100.0 * saved, 100.0 * SavedFraction(plan)));
  return notes;
}

// The words of an engine whose K and V take `bits` of a token.
PlanExport Words(std::string text, double bits, const Plan& plan, const std::string& engine,
                 bool rotates) {
  const double saved = 1.0 - bits / (8.0 * static_cast<double>(Fp16BytesPerToken(plan.model)));
  return {std::move(text), saved, Notes(plan, engine, saved, rotates)};
}

PlanExport ForLlama(const Plan& plan) {
  const OneForAll k = ForAllLayers(plan, KVMIX_K, kLlamaTypes),
                  v = ForAllLayers(plan, KVMIX_V, kLlamaTypes);
  PlanExport result =
      Words(fmt::format("--cache-type-k {} --cache-type-v {}\n", k.type->name, v.type->name),
            k.numbers * k.type->bits + v.numbers * v.type->bits, plan, "llama.cpp", true);
  result.notes.push_back(fmt::format("All layers have one type: {}, {}.", k.raised, v.raised));
  result.notes.push_back("A V below f16 needs flash attention.");
  return result;
}

PlanExport ForIkLlama(const Plan& plan) {
  double bits = 0.0;
  std::vector<std::string> flags;
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    const Split split = BestSplit(Needs(plan, t, kIkTypes), kIkTypes, plan.model.layers.size());
    const char letter = t == KVMIX_K ? 'k' : 'v';
    const auto name = [](std::size_t type) { return kIkTypes[type].name; };
    flags.push_back(fmt::format("-ct{} {}", letter, name(split.middle)));
    if (split.first_layers > 0)
      flags.push_back(
          fmt::format("-ct{}-first {},{}", letter, name(split.first), split.first_layers));
    if (split.last_layers > 0)
      flags.push_back(fmt::format("-ct{}-last {},{}", letter, name(split.last), split.last_layers));
    if (Count(plan, t, &CodecKind::hadamard) > 0) flags.push_back(fmt::format("-{}had", letter));
    bits += split.bits;
  }
  PlanExport result =
      Words(fmt::format("{}\n", fmt::join(flags, " ")), bits, plan, "ik_llama.cpp", true);
  result.notes.push_back(
      "Heads of a layer have one type, and layers three at most: the first, the last, the others.");
  result.notes.push_back("A V below f16 needs flash attention.");
  return result;
}

PlanExport ForModelOptimizer(const Plan& plan) {
  const std::vector<LayerNeed> k = Needs(plan, KVMIX_K, kOptimizerTypes),
                               v = Needs(plan, KVMIX_V, kOptimizerTypes);
  Json layers = Json::object();
  std::set<std::string> algorithms;
  double bits = 0.0;
  for (std::size_t i = 0; i < k.size(); ++i) {
    const LayerShape& shape = plan.model.layers[k[i].layer];
    const Type *k_type = &kOptimizerTypes[k[i].type], *v_type = &kOptimizerTypes[v[i].type];
    const bool differ = k_type->holds == 8 && v_type->holds == 4 && shape.k_dim == shape.v_dim;
    if (!differ) k_type = v_type = std::max(k_type, v_type);
    bits += static_cast<double>(k[i].numbers) * k_type->bits +
            static_cast<double>(v[i].numbers) * v_type->bits;
    if (k_type->holds == 16) continue;
    const std::string algorithm = differ ? "FP8_K_NVFP4_V" : k_type->name;
    layers[fmt::format("model.layers.{}.self_attn", k[i].layer)] = {{"quant_algo", algorithm}};
    algorithms.insert(algorithm);
  }
  Json quantization = {{"kv_cache_quant_algo", nullptr}};
  if (!algorithms.empty()) {
    quantization = {
        {"kv_cache_quant_algo", algorithms.size() == 1 ? *algorithms.begin() : "MIXED_PRECISION"},
        {"kv_cache_quantized_layers", layers},
        {"kv_cache_schema_version", 1}};
  }
  const Json json = {{"producer", {{"name", "kvmix"}, {"version", std::string(Version())}}},
                     {"quantization", quantization}};
  PlanExport result = Words(json.dump(1) + "\n", bits, plan, "model-optimizer", false);
  result.notes.push_back(
      "FP8 has 4 significant bits, and one scale for all tokens, which Model-Optimizer calibrates: "
      "it is coarser than int8 with a scale per token. This file names formats only.");
  result.notes.push_back(
      "Layers are named as in Hugging Face's Llama and Qwen; those not named stay unquantized.");
  return result;
}

// Channels that all heads' widths are multiples of: a whole head, where all are as wide.
std::size_t OpenVinoGroup(const Plan& plan, Tensor t) {
  std::size_t group = 0;
  for (const LayerShape& shape : plan.model.layers)
    if (shape.owns_kv()) group = std::gcd(group, shape.dim(t));
  return group;
}

PlanExport ForOpenVino(const Plan& plan) {
  Json properties;
  double bits = 0.0;
  bool has_groups = false;
  std::vector<std::string> raised;
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    const OneForAll one = ForAllLayers(plan, t, kOpenVinoTypes);
    const std::string name = t == KVMIX_K ? "KEY_CACHE" : "VALUE_CACHE";
    bits += one.numbers * one.type->bits;
    properties[name + "_PRECISION"] = one.type->name;
    if (one.type->holds < 16) {
      const std::size_t group = OpenVinoGroup(plan, t);
      properties[name + "_GROUP_SIZE"] = group;
      bits += one.numbers / static_cast<double>(group) * kOpenVinoGroupBits;
      has_groups = true;
    }
    raised.push_back(one.raised);
  }
  PlanExport result = Words(properties.dump(1) + "\n", bits, plan, "openvino", false);
  result.notes.push_back(fmt::format(
      "All layers have one precision, no property names one layer: {}.", fmt::join(raised, ", ")));
  if (has_groups)
    result.notes.push_back(
        "Every group of channels has a scale and a zero point, both f32. A group is as wide as a "
        "head, as in the plan, or, where widths differ, as their greatest common divisor; groups "
        "of 32 take more bytes and round finer.");
  if (properties["KEY_CACHE_PRECISION"] == "u4")
    result.notes.push_back("Older releases take u4 for values only, and u8 or f16 for keys.");
  result.notes.push_back(
      "On x86 KEY_CACHE_QUANT_MODE BY_CHANNEL gives every channel of K a scale for a block of "
      "tokens, which keys with a bias may need. A plan says nothing of it: measure it.");
  return result;
}

}  // namespace

PlanExport ExportPlan(const Plan& plan, const std::string& engine) {
  if (engine == "llama.cpp") return ForLlama(plan);
  if (engine == "ik_llama.cpp") return ForIkLlama(plan);
  if (engine == "openvino") return ForOpenVino(plan);
  return ForModelOptimizer(plan);
}

std::string NotesText(const PlanExport& found, const std::string& engine) {
  std::string text = fmt::format("What {} has not:", engine);
  for (const std::string& note : found.notes) {
    std::istringstream words(note);
    text += "\n -";
    std::size_t column = 2;
    for (std::string word; words >> word; column += 1 + word.size()) {
      if (column + 1 + word.size() > kColumns) {
        text += "\n  ";
        column = 2;
      }
      text += " " + word;
    }
  }
  return text + "\n";
}

std::string ToJson(const PlanExport& found, const Plan& plan, const std::string& engine) {
  const Json json = {{"engine", engine},
                     {"text", found.text},
                     {"saved_fraction", found.saved_fraction},
                     {"plan_saved_fraction", SavedFraction(plan)},
                     {"notes", found.notes}};
  return json.dump(1) + "\n";
}

}  // namespace kvmix::tools
