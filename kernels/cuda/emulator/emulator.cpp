// A libcuda.so (and libnvrtc.so) that runs this folder's kernels on the host, so that `device check` can be run where there is no GPU.
//
// Every CUDA thread is a fibre with a stack of its own; one OS thread runs them in turn and switches where a thread waits for
// others. The blocks of a cluster run together, clusters one after the other. build.sh compiles the kernels into it.
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx.cuh"

Three threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr u32 ARENA = 256 * 1024, STACK = 128 * 1024;

struct Barrier {
    int arrivals, pending, bytes;
    u32 phase;
    void settle() {
        if (pending == 0 && bytes == 0) pending = arrivals, ++phase;
    }
};

// Where some threads of a group wait for the rest; threads that have ended count as come.
struct Meeting {
    u32 come = 0, generation = 0;
};

struct Warp {
    Meeting meeting;
    u64 values[2][32];
    u32 present[2] = {0, 0}, live = 0;
};

struct Block {
    Three index;
    u32 rank, live;
    std::vector<u8> memory;
    u8* base;
    Meeting all, named[16], group[8];
    void* brought[8][128];
    std::vector<Warp> warps;
    std::unordered_map<u32, Barrier> barriers;
};

struct Fibre {
    void* sp;
    std::vector<u8> stack;
    Block* block;
    u32 thread;
    bool ended;
};

std::vector<Block> blocks;
std::deque<Fibre> fibres;
Fibre* running;
void* scheduler_sp;
Meeting cluster_meeting;
u32 cluster_live;
u64 progress;
void (*kernel)(void**);
void** arguments;

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void yield() { emulator_switch(&running->sp, scheduler_sp); }

template <class F>
void wait_until(F holds) {
    while (!holds()) yield();
    ++progress;
}

// Waits until `need()` threads have come to `meeting`.
template <class F>
void meet(Meeting& meeting, F need) {
    u32 generation = meeting.generation;
    ++meeting.come;
    wait_until([&] {
        if (meeting.generation != generation) return true;
        if (meeting.come < need()) return false;
        meeting.come = 0;
        ++meeting.generation;
        return true;
    });
}

u8* shared_memory() { return running->block->base; }
u8* at(u32 address) {
    u32 peer = address >> 24;
    if ((address & 0xffffff) >= ARENA) fprintf(stderr, "emulator: shared address %x\n", address), abort();
    return (peer ? blocks[peer - 1] : *running->block).base + (address & 0xffffff);
}
u32 rank() { return running->block->rank; }

void meet_warp(u64 value, u64 (&values)[32], u32& present) {
    Warp& warp = running->block->warps[running->thread / 32];
    u32 buffer = warp.meeting.generation & 1, lane = running->thread % 32;
    if (warp.meeting.come == 0) warp.present[buffer] = 0;
    warp.values[buffer][lane] = value;
    warp.present[buffer] |= 1u << lane;
    meet(warp.meeting, [&] { return warp.live; });
    memcpy(values, warp.values[buffer], sizeof values);
    present = warp.present[buffer];
}
void meet_block() { meet(running->block->all, [] { return running->block->live; }); }
void meet_cluster() { meet(cluster_meeting, [] { return cluster_live; }); }
void meet_named(u32 id, u32 threads, bool wait) {
    Meeting& meeting = running->block->named[id];
    if (wait) return meet(meeting, [=] { return threads; });
    ++progress;
    if (++meeting.come == threads) meeting.come = 0, ++meeting.generation;
}
void meet_warpgroup(void* mine, void (*once)(void**, void*), void* context) {
    Block& block = *running->block;
    u32 group = running->thread / 128;
    block.brought[group][running->thread % 128] = mine;
    Meeting& meeting = block.group[group];
    u32 generation = meeting.generation;
    if (++meeting.come == 128) {
        once(block.brought[group], context);
        meeting.come = 0;
        ++meeting.generation;
    }
    wait_until([&] { return meeting.generation != generation; });
}

Barrier& barrier(u32 bar) {
    u32 peer = bar >> 24;
    Block& block = peer ? blocks[peer - 1] : *running->block;
    return block.barriers[bar & 0xffffff];
}
void barrier_init(u32 bar, u32 arrivals) { barrier(bar) = {(int)arrivals, (int)arrivals, 0, 0}; }
void barrier_arrive(u32 bar, u32 expect_bytes) {
    Barrier& b = barrier(bar);
    if (b.arrivals == 0) fprintf(stderr, "emulator: barrier %x not initialised\n", bar), abort();
    b.bytes += (int)expect_bytes;
    --b.pending;
    b.settle();
    ++progress;
}
void barrier_complete(u32 bar, u32 bytes) {
    Barrier& b = barrier(bar);
    b.bytes -= (int)bytes;
    b.settle();
    ++progress;
}
void barrier_wait(u32 bar, u32 parity) {
    Barrier& b = barrier(bar);
    wait_until([&] { return (b.phase & 1) != parity; });
}

struct Map {
    u8* base;
    u64 strides[4];
    u32 dims[5], box[5], rank, element;
};
static_assert(sizeof(Map) <= 128, "as large as the driver's");

void copy_box(u32 to, const TensorMap* opaque, u32 bar, const int* start, u32 dims, u32 mask) {
    Map map;
    memcpy(&map, opaque, sizeof map);
    if (map.rank != dims || to % 128) fprintf(stderr, "emulator: box of rank %u to %x\n", dims, to), abort();
    u32 rows = 1, row_bytes = map.box[0] * map.element;
    for (u32 d = 1; d < dims; ++d) rows *= map.box[d];
    for (u32 target = 0; target < blocks.size(); ++target) {
        if (mask ? !(mask >> target & 1) : &blocks[target] != running->block) continue;
        for (u32 r = 0; r < rows; ++r) {
            u64 offset = 0;
            u32 rest = r;
            bool inside = true;
            for (u32 d = 1; d < dims; ++d) {
                i64 i = start[d] + (i64)(rest % map.box[d]);
                rest /= map.box[d];
                inside &= i >= 0 && i < (i64)map.dims[d];
                offset += (u64)i * map.strides[d - 1];
            }
            for (u32 b = 0; b < row_bytes; b += 16) {
                u32 address = to + r * row_bytes + b;
                u8* target_bytes = blocks[target].base + (address ^ (address >> 7 & 7) << 4);
                i64 column = start[0] + b / map.element;
                if (inside && column < (i64)map.dims[0])
                    memcpy(target_bytes, map.base + offset + (u64)column * map.element, 16);
                else
                    memset(target_bytes, 0, 16);
            }
        }
        barrier_complete((target + 1) << 24 | (bar & 0xffffff), rows * row_bytes);
    }
}

void store_box(u32 from, const TensorMap* opaque, int x, int y) {
    Map map;
    memcpy(&map, opaque, sizeof map);
    if (map.rank != 2 || from % 128) fprintf(stderr, "emulator: box of rank %u from %x\n", map.rank, from), abort();
    for (u32 r = 0; r < map.box[1] && y + r < map.dims[1]; ++r)
        for (u32 b = 0; b < 128 && x + b / map.element < map.dims[0]; b += 16) {
            u32 address = from + r * 128 + b;
            memcpy(map.base + (u64)(y + r) * map.strides[0] + (u64)x * map.element + b, at(address ^ (address >> 7 & 7) << 4), 16);
        }
}

void run_fibre() {
    kernel(arguments);
    running->ended = true;
    --running->block->live;
    --running->block->warps[running->thread / 32].live;
    --cluster_live;
    ++progress;
    yield();
}

void run_cluster(u32 threads) {
    cluster_meeting = {};
    cluster_live = threads * (u32)blocks.size();
    size_t used = 0;
    for (Block& block : blocks) {
        block.live = threads;
        block.warps.assign((threads + 31) / 32, {});
        for (u32 t = 0; t < threads; ++t) {
            ++block.warps[t / 32].live;
            if (fibres.size() == used) fibres.push_back({nullptr, std::vector<u8>(STACK), nullptr, 0, false});
            Fibre& fibre = fibres[used++];
            fibre.block = &block;
            fibre.thread = t;
            fibre.ended = false;
            u64* top = (u64*)((u64)(fibre.stack.data() + STACK) & ~63ull) - 1;
            *--top = (u64)run_fibre;  // returned to by the first switch
            top -= 6;
            fibre.sp = top;
        }
    }
    for (u32 idle = 0; cluster_live > 0;) {
        u64 before = progress;
        for (size_t i = 0; i < used; ++i) {
            running = &fibres[i];
            if (running->ended) continue;
            threadIdx = {running->thread, 0, 0};
            blockIdx = running->block->index;
            emulator_switch(&scheduler_sp, running->sp);
        }
        idle = progress == before ? idle + 1 : 0;
        if (idle > 4) fprintf(stderr, "emulator: deadlock, %u threads wait\n", cluster_live), abort();
    }
}

// ---- the kernels, by name ------------------------------------------------------------------------------------------

std::map<std::string, void (*)(void**)>& kernels() {
    static std::map<std::string, void (*)(void**)> all;
    return all;
}
template <auto F, class... P, size_t... I>
void call(void (*)(P...), void** p, std::index_sequence<I...>) {
    F(*(std::remove_cv_t<P>*)p[I]...);
}
template <auto F>
void wrapper(void** p) {
    [&]<class... P>(void (*f)(P...)) { call<F>(f, p, std::index_sequence_for<P...>()); }(F);
}
template <auto F>
bool add(const char* name) {
    kernels()[name] = wrapper<F>;
    return true;
}
}  // namespace emulator

#define KERNEL(NAMESPACE, NAME) static bool added_##NAME = emulator::add<NAMESPACE::NAME>(#NAME);
#include "kernels.inc"

// ---- the driver ----------------------------------------------------------------------------------------------------

extern "C" {
typedef int Result;
struct Config {
    u32 grid[3], block[3], shared;
    void* stream;
    struct Attribute {
        u32 id;
        char pad[4];
        u32 value[16];
    }* attributes;
    u32 count;
};

// NVRTC: the kernels are in here already, so a program is a byte of nothing.
Result nvrtcCreateProgram(void** p, const char*, const char*, int, const char* const*, const char* const*) { return *p = (void*)5, 0; }
Result nvrtcCompileProgram(void*, int, const char* const*) { return 0; }
Result nvrtcGetCUBINSize(void*, size_t* n) { return *n = 1, 0; }
Result nvrtcGetCUBIN(void*, char* code) { return *code = 0, 0; }
Result nvrtcGetProgramLogSize(void*, size_t* n) { return *n = 1, 0; }
Result nvrtcGetProgramLog(void*, char* log) { return *log = 0, 0; }
Result nvrtcDestroyProgram(void** p) { return *p = nullptr, 0; }

Result cuInit(u32) { return 0; }
Result cuDeviceGet(int* d, int) { return *d = 0; }
Result cuDeviceGetName(char* name, int len, int) { return snprintf(name, len, "host emulation"), 0; }
Result cuDeviceGetAttribute(int* v, int attribute, int) { return *v = attribute == 16 ? 4 : 0, 0; }  // multiprocessors
Result cuDevicePrimaryCtxRetain(void** c, int) { return *c = (void*)1, 0; }
Result cuDevicePrimaryCtxRelease_v2(int) { return 0; }
Result cuCtxSetCurrent(void*) { return 0; }
Result cuCtxGetCurrent(void** c) { return *c = (void*)1, 0; }
Result cuCtxSynchronize() { return 0; }
Result cuStreamCreate(void** s, u32) { return *s = (void*)2, 0; }
Result cuStreamDestroy_v2(void*) { return 0; }
Result cuStreamSynchronize(void*) { return 0; }
Result cuStreamWaitEvent(void*, void*, u32) { return 0; }
Result cuEventCreate(void** e, u32) { return *e = (void*)3, 0; }
Result cuEventRecord(void*, void*) { return 0; }
Result cuEventDestroy_v2(void*) { return 0; }
Result cuMemAlloc_v2(u64* p, size_t n) { return *p = (u64)aligned_alloc(256, (n + 511) & ~255ull), 0; }
Result cuMemFree_v2(u64 p) { return free((void*)p), 0; }
Result cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t n, void*) { return memcpy((void*)to, from, n), 0; }
Result cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t n, void*) { return memcpy(to, (void*)from, n), 0; }
Result cuMemsetD8Async(u64 p, u8 v, size_t n, void*) { return memset((void*)p, v, n), 0; }
Result cuModuleLoadData(void** m, const void*) { return *m = (void*)4, 0; }
Result cuModuleGetFunction(void** f, void*, const char* name) {
    auto found = emulator::kernels().find(name);
    if (found == emulator::kernels().end()) return 500;
    return *f = (void*)found->second, 0;
}
Result cuFuncGetAttribute(int* v, int, void*) { return *v = 0; }
Result cuFuncSetAttribute(void*, int, int) { return 0; }
Result cuTensorMapEncodeTiled(void* out, u32 type, u32 rank, void* base, const u64* dims, const u64* strides, const u32* box,
                              const u32*, u32, u32, u32, u32) {
    emulator::Map map = {(u8*)base, {}, {}, {}, rank, type == 0 ? 1u : 2u};
    for (u32 d = 0; d < rank; ++d) {
        map.dims[d] = (u32)dims[d];
        map.box[d] = box[d];
        if (d > 0) map.strides[d - 1] = strides[d - 1];
        if (d > 0 && strides[d - 1] % 16) return 1;
    }
    if ((u64)base % 16 || map.box[0] * map.element != 128) return 1;
    memcpy(out, &map, sizeof map);
    return 0;
}
Result cuLaunchKernelEx(const Config* config, void* function, void** arguments, void**) {
    using namespace emulator;
    u32 cluster = 1, threads = config->block[0];
    for (u32 i = 0; i < config->count; ++i)
        if (config->attributes[i].id == 4) cluster = config->attributes[i].value[0];
    if (config->grid[0] % cluster) return 1;
    kernel = (void (*)(void**))function;
    emulator::arguments = arguments;
    gridDim = {config->grid[0], config->grid[1], config->grid[2]};
    blockDim = {threads, 1, 1};
    blocks.resize(cluster);
    for (u32 z = 0; z < gridDim.z; ++z)
        for (u32 y = 0; y < gridDim.y; ++y)
            for (u32 x = 0; x < gridDim.x; x += cluster) {
                for (u32 r = 0; r < cluster; ++r) {
                    Block& block = blocks[r];
                    if (block.memory.empty()) block.memory.resize(ARENA + 1024);
                    block.base = (u8*)(((u64)block.memory.data() + 1023) & ~1023ull);
                    memset(block.base, 0xff, ARENA);  // NaN: nothing may be read before it is written
                    block.index = {x + r, y, z};
                    block.rank = r;
                    block.all = {};
                    for (Meeting& m : block.named) m = {};
                    for (Meeting& m : block.group) m = {};
                    block.barriers.clear();
                }
                run_cluster(threads);
            }
    return 0;
}
}
