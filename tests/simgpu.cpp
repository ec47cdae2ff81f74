// A device for PyTorch that is not the host, "simgpu", as strict as CUDA but computed by the host's kernels: what else
// only a GPU shows, tensors of two devices in one operator, numbers that the host waits for, shows anywhere, and bits
// are the CPU's. New memory is filled with 0xff (NaN, -1).
//
// An operator that is not registered below goes through `on_host`: its device tensors become host tensors of the same
// bytes, the CPU's kernel runs, what it makes is copied back.
//
// With -DAS_CUDA the device is "cuda" itself, in a torch that was built without CUDA and has left its place empty.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <set>

#ifdef AS_CUDA
#define KEY CUDA
#else
#define KEY PrivateUse1
#endif

using at::Tensor;
using c10::IValue;
using std::optional;
const c10::Device SIM(c10::DeviceType::KEY, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, SIM);
const c10::DispatchKeySet KEYS(c10::DispatchKey::KEY);

std::atomic<size_t> held, most;  // bytes of tensors, and the most since Python put `most` back

struct Block {
  c10::DataPtr bytes;
  size_t n;
  ~Block() { held -= n; }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto block = new Block{c10::GetCPUAllocator()->allocate(n), n};
    if (n) std::memset(block->bytes.get(), 0xff, n);
    most = std::max<size_t>(most, held += n);
    return {block->bytes.get(), block, [](void* x) { delete static_cast<Block*>(x); }, SIM};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
static Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::KEY, &memory);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::KEY> {  // one device, one stream
  c10::Device exchangeDevice(c10::Device) const override { return SIM; }
  c10::Device getDevice() const override { return SIM; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
};
C10_REGISTER_GUARD_IMPL(KEY, Guard);

#ifdef AS_CUDA
struct CUDAHooks final : at::CUDAHooksInterface {  // torch finds it by this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
#else
struct Hooks final : at::PrivateUse1HooksInterface {
#endif
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
#ifdef AS_CUDA
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}
#endif

static void (*on_wait)(const char*);  // called with the name of what makes the host wait for the device
static Tensor rng;                    // the state of the device's generator

void waits(const std::string& why) {
  if (on_wait) on_wait(why.c_str());
}

bool there(const Tensor& x) { return x.defined() && x.device() == SIM; }

Tensor host(const Tensor& x) {
  if (!there(x)) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [x](void*) {}, x.options().device(at::kCPU));
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> dtype,
                     optional<at::Layout> = {}, optional<at::Device> = {}, optional<bool> = {}) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool> pinned, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (there(from) != there(to) && !(non_blocking && there(to))) waits(there(to) ? "to the device" : "to the host");
  host(to).copy_(host(from));
  return to;
}

at::Scalar item(const Tensor& x) {
  waits("item");
  return at::_local_scalar_dense(host(x));
}

// Of these the host has to know the result, or its length.
const std::set<std::string> WAITING = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // of the device, and the host tensor in its place
  std::vector<Tensor> strangers;
  auto moved = [&](const Tensor& x, bool written = false, bool may_be_host = false) {
    if (x.defined() && !there(x) && !may_be_host) strangers.push_back(x);
    if (!there(x)) return x;
    pairs.emplace_back(x, written && !x.numel() ? at::empty(x.sizes(), x.options().device(at::kCPU)) : host(x));
    return pairs.back().second;
  };
  for (size_t i = 0; i < count; ++i) {
    IValue& v = (*stack)[first + i];
    const bool written = schema.arguments()[i].alias_info() && schema.arguments()[i].alias_info()->isWrite();
    if (v.isTensor()) {
      v = moved(v.toTensor(), written, !written && !v.toTensor().dim());  // (a number may be the host's)
    } else if (v.isTensorList()) {
      c10::List<Tensor> xs;
      for (const Tensor& x : v.toTensorVector()) xs.push_back(moved(x, written));
      v = xs;
    } else if (v.isOptionalTensorList()) {
      c10::List<optional<Tensor>> xs;
      for (optional<Tensor> x : v.toOptionalTensorList()) {
        if (x && there(*x) && x->scalar_type() == at::kBool) waits(schema.name());  // a mask
        xs.push_back(x ? optional<Tensor>(moved(*x)) : x);
      }
      v = xs;
    } else if (v.isDevice()) {
      v = c10::Device(at::kCPU);
    }
    TORCH_CHECK(!v.isGenerator(), schema.name(), ": expected a generator of simgpu, this is the host's");
  }
  TORCH_CHECK(strangers.empty() || pairs.empty(), "Expected all tensors to be on the same device: ", schema.name(),
              " is given one of shape ", strangers[0].sizes(), " on the host");
  if (WAITING.count(schema.name())) waits(schema.name());

  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  const Tensor of_host = generator.get_state();
  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  if (draws) generator.set_state(rng);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (draws) rng = generator.get_state(), generator.set_state(of_host);

  for (auto& [x, y] : pairs)  // one that was empty has been given its size
    if (x.sizes() != y.sizes()) x.resize_(y.sizes()), host(x).copy_(y);
  auto back = [&](const Tensor& y) {
    for (auto& [x, in_place] : pairs)
      if (y.is_same(in_place)) return x;
    for (auto& [x, other] : pairs)
      TORCH_CHECK(!y.defined() || !y.is_alias_of(other), schema.name(), " makes a view: register it below");
    Tensor x = y.defined() ? empty_strided(y.sizes(), y.strides(), y.scalar_type()) : y;
    if (y.defined()) host(x).copy_(y);
    return x;
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) v = back(v.toTensor());
    TORCH_CHECK(!v.isTensorList(), schema.name(), " makes a list");
  }
}

TORCH_LIBRARY_IMPL(_, KEY, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, KEY, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  // What would else be put together from other operators, in other roundings.
  for (auto name : {"native_layer_norm", "native_group_norm", "silu_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

extern "C" {
void open_device(void (*f)(const char*)) {
#ifndef AS_CUDA
  at::RegisterPrivateUse1HooksInterface(new Hooks());
#endif
  on_wait = f;
  rng = at::globalContext().defaultGenerator(at::kCPU).get_state();
}
void get_rng(void* state) { std::memcpy(state, rng.data_ptr(), rng.nbytes()); }
void set_rng(const void* state) { std::memcpy(rng.data_ptr(), state, rng.nbytes()); }
}
