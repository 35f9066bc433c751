// Inference on a CPU: tokens through the decoder layers.
//
// The memory bandwidth limits a decode step, which reads each weight once. Threads therefore read
// several rows at the same time, far apart, each in the order of memory. General libraries are
// designed for many tokens and reach a third to a half of the bandwidth. All layers are one call, so
// that threads do not sleep between operations. The result of a token does not depend on the
// other sequences.
//
// Activations are float or bfloat16. Weights have the same type, or 8 or 4 bits with scales
// (`weight_only_quantization.py`). Sums are in float. All arrays are row-major.
// Vectors are those of the compiler (vector_size), so that every CPU is supported. Products of
// bfloat16 and of integers have no such form; the instructions are used where the CPU has them.

#include "attention.h"
#include "simd.h"
#include "matmul.h"
#include "thread_pool.h"

namespace {

// A decoder layer. Same order as `ops.Layer`.
struct Layer {
  Matrix query, key, value, output, gate, up, down;
  const void *norm, *second_norm;
  void *keys, *values;  // (R, h, C, d)
  int64_t D, heads;
  float epsilon, second_epsilon, scaling;

  // Calls `use` with the matrices that multiply the same tokens.
  template <class Use>
  void for_each_input(const Use& use) const {
    use({&query, &key, &value}), use({&output}), use({&gate, &up}), use({&down});
  }
};

template <class T>
void rms_norm(const Worker& worker, const T* x, const void* weight, T* y, int64_t M, int64_t D,
              float epsilon) {
  const auto [from, to] = worker.share(M, 1);
  const T* scale = static_cast<const T*>(weight);
  for (int64_t m = from; m < to; m++) {
    const T* row = x + m * D;
    Floats squares = {};
    for (int64_t i = 0; i < D; i += WIDTH) squares += load(row + i) * load(row + i);
    const float inverse = 1 / std::sqrt(sum(squares) / D + epsilon);
    for (int64_t i = 0; i < D; i += WIDTH) {
      T normed[WIDTH];  // LLaMA rounds before it multiplies with the weight
      store(normed, load(row + i) * inverse);
      store(y + m * D + i, load(normed) * load(scale + i));
    }
  }
}

// gate = silu(gate) * up
template <class T>
void swiglu(T* gate, const T* up, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const Floats g = load(gate + i);
    store(gate + i, g / (1 + exponential(-g)) * load(up + i));
  }
  for (; i < n; i++) {
    const float g = to_float(gate[i]);
    store(gate + i, g / (1 + std::exp(-g)) * to_float(up[i]));
  }
}

// The number of values between the two products of LoRA, of matrices that multiply the same tokens.
inline int64_t lora_values(Matrices matrices) {
  int64_t count = 0;
  for (const Matrix* matrix : matrices)
    for (int64_t i = 0; i < matrix->num_loras; i++)
      count += matrix->loras[i].n * matrix->loras[i].R;
  return count;
}

// The intermediate results of a layer.
template <class T>
struct Workspace {
  Array<T> normed, query, key, value, attended, gate, up, added;
  Array<float> lora;
  PreparedTokens tokens;

  // For `count` layers of the same shape, whose matrices may be of different kinds.
  Workspace(const Layer* layers, int64_t count, int64_t M, int activation_bits)
      : normed(M * layers->D),
        query(M * layers->query.N),
        key(M * layers->key.N),
        value(M * layers->value.N),
        attended(M * layers->query.N),
        gate(M * layers->gate.N),
        up(M * layers->up.N),
        added(M * layers->D),
        tokens(token_forms(layers, count, activation_bits)
                   .tokens<T>(M, std::max({layers->D, layers->query.N, layers->gate.N}))) {
    int64_t size = 0;
    for (const Layer* l = layers; l < layers + count; l++)
      l->for_each_input([&](Matrices matrices) { size = std::max(size, lora_values(matrices)); });
    lora.resize(size);
  }

  static TokenForms token_forms(const Layer* layers, int64_t count, int activation_bits) {
    TokenForms forms;
    for (const Layer* l = layers; l < layers + count; l++)
      l->for_each_input([&](Matrices matrices) { forms.add(matrices, activation_bits); });
    return forms;
  }
};

// One layer for hidden (M, D) in place.
template <class T>
void decoder_layer(Worker& worker, const Layer& l, const CacheSlots& slots, Workspace<T>& space,
                   T* hidden, int activation_bits) {
  const int64_t M = slots.M;
  const float* inner = nullptr;  // of LoRA of the next matrix
  // Waits until all threads have computed x, and prepares its products with these matrices: it is
  // brought into the forms that they need, and multiplied with the first matrices of LoRA.
  const auto ready = [&](const Array<T>& x, Matrices matrices) {
    worker.wait();
    const int64_t K = int64_t(x.size()) / M;
    const bool is_prepared =
        prepare(space.tokens, worker, x.data(), K, matrices, activation_bits);
    float* z = space.lora.data();
    inner = z;
    for (const Matrix* matrix : matrices)
      for (int64_t i = 0; i < matrix->num_loras; i++) {
        const Lora& lora = matrix->loras[i];
        lora.reduce(worker.share(lora.R, 1), x.data(), K, z);
        z += lora.n * lora.R;
      }
    if (is_prepared || z != inner) worker.wait();
  };
  const auto product = [&](const Matrix& m, const Array<T>& x, Array<T>& y) {
    const Range range = worker.share(m.N, ROW_STEP);
    m.multiply_range(range, x.data(), space.tokens, activation_bits, y.data(), M,
                     int64_t(x.size()) / M);
    for (int64_t i = 0; i < m.num_loras; i++) {
      m.loras[i].add(range, inner, y.data(), m.N);
      inner += m.loras[i].n * m.loras[i].R;
    }
    return range;
  };
  const auto add = [&](const Matrix& m, const Array<T>& x) {
    const auto [from, to] = product(m, x, space.added);
    for (int64_t b = 0; b < M; b++)
      for (int64_t i = b * l.D + from; i < b * l.D + to; i += WIDTH)
        store(hidden + i, load(hidden + i) + load(&space.added[i]));
  };
  rms_norm(worker, hidden, l.norm, space.normed.data(), M, l.D, l.epsilon);
  ready(space.normed, {&l.query, &l.key, &l.value});
  product(l.query, space.normed, space.query);
  product(l.key, space.normed, space.key);
  product(l.value, space.normed, space.value);
  worker.wait();
  attention(worker, slots, space.key.data(), space.value.data(), space.query.data(),
            space.attended.data(), l.heads, l.scaling);
  ready(space.attended, {&l.output});
  add(l.output, space.attended);
  worker.wait();
  rms_norm(worker, hidden, l.second_norm, space.normed.data(), M, l.D, l.second_epsilon);
  ready(space.normed, {&l.gate, &l.up});
  const auto [from, to] = product(l.gate, space.normed, space.gate);
  product(l.up, space.normed, space.up);
  for (int64_t b = 0; b < M; b++)
    swiglu(&space.gate[b * l.gate.N + from], &space.up[b * l.gate.N + from], to - from);
  ready(space.gate, {&l.down});
  add(l.down, space.gate);
  worker.wait();
}

template <class T>
void decoder_layers(const Layer* layers, int64_t count, const CacheSlots& first, T* hidden,
                    int activation_bits, int threads) {
  Workspace<T> space(layers, count, first.M, activation_bits);
  parallel(threads, [&](Worker worker) {
    for (const Layer* l = layers; l < layers + count; l++) {
      CacheSlots slots = first;
      slots.keys = l->keys, slots.values = l->values;
      decoder_layer(worker, *l, slots, space, hidden, activation_bits);
    }
  });
}

template <class T>
void linear(const Matrix& matrix, const T* x, T* y, int64_t M, int64_t K, int activation_bits,
            int threads) {
  TokenForms forms;
  forms.add({&matrix}, activation_bits);
  PreparedTokens tokens = forms.tokens<T>(M, K);
  parallel(threads, [&](Worker worker) {
    if (prepare(tokens, worker, x, K, {&matrix}, activation_bits)) worker.wait();
    matrix.multiply_range(worker.share(matrix.N, ROW_STEP), x, tokens, activation_bits, y, M, K);
  });
}

template <class T>
void dequantize(const Matrix& matrix, T* out, int64_t K, int threads) {
  parallel(threads, [&](Worker worker) {
    const auto [from, to] = worker.share(matrix.N, WIDTH);
    for (int64_t n = from; n < to; n += WIDTH) matrix.quantized(K).dequantize(n, out + n * K);
  });
}
}  // namespace

// The vector instructions in use, for `owl2 info`.
extern "C" const char* instruction_set() {
#if OWL2_TILES
  if (has_tiles()) return "AMX and AVX-512 with VNNI and BF16";
#endif
#if defined(__AVX512BF16__)
  return "AVX-512 with VNNI and BF16";
#elif defined(__AVX512VNNI__)
  return "AVX-512 with VNNI";
#elif defined(__AVX512BW__)
  return "AVX-512";
#elif defined(__AVXVNNI__)
  return "AVX2 with VNNI";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__SSE4_2__)
  return "SSE4.2";
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return "NEON with I8MM";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON with dot products";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "generic";
#endif
}

// The functions that `ops.py` calls, for float and for bfloat16. K and d are multiples of
// `Product<T>::STEP`; `ops.py` ensures it.
#define EXPORT(T, NAME)                                                                           \
  extern "C" void linear_##NAME(const Matrix* matrix, const T* x, T* y, int64_t M, int64_t K,     \
                                int64_t activation_bits, int64_t threads) {                       \
    linear(*matrix, x, y, M, K, activation_bits, threads);                                        \
  }                                                                                               \
  extern "C" void dequantize_##NAME(const Matrix* matrix, T* out, int64_t K, int64_t threads) {   \
    dequantize(*matrix, out, K, threads);                                                         \
  }                                                                                               \
  extern "C" void rms_norm_##NAME(const T* x, const void* weight, T* y, int64_t M, int64_t D,     \
                                  float epsilon, int64_t threads) {                               \
    parallel(threads, [&](Worker worker) { rms_norm(worker, x, weight, y, M, D, epsilon); });     \
  }                                                                                               \
  extern "C" void swiglu_##NAME(T* gate, const T* up, int64_t n, int64_t threads) {               \
    parallel(threads, [&](Worker worker) {                                                        \
      const auto [from, to] = worker.share(n, ROW_STEP);                                          \
      swiglu(gate + from, up + from, to - from);                                                  \
    });                                                                                           \
  }                                                                                               \
  extern "C" void attention_##NAME(const CacheSlots* slots, const T* key, const T* value,         \
                                   T* query, T* out, int64_t heads, float scaling,                \
                                   int64_t threads) {                                             \
    parallel(threads, [&](Worker worker) {                                                        \
      attention(worker, *slots, key, value, query, out, heads, scaling);                          \
    });                                                                                           \
  }                                                                                               \
  extern "C" void decoder_layers_##NAME(const Layer* layers, int64_t count,                       \
                                        const CacheSlots* slots, T* hidden,                       \
                                        int64_t activation_bits, int64_t threads) {               \
    decoder_layers(layers, count, *slots, hidden, activation_bits, threads);                      \
  }
EXPORT(float, float32)
EXPORT(bf16, bfloat16)
