// Entry points that copy and fill memory.
#pragma once
#include "streams.h"

namespace standin {

static void count_copy(const char* direction, uint64_t bytes) {
    if (++count("copies") == settings().fail_copy) break_device(launch_failed, "STANDIN_FAIL_COPY fails this copy");
    count(direction) += bytes;
}
static Work copy(const char* name, Stream& stream, const Span& to, const Span& from, uint64_t bytes_per_us) {
    Work work = enqueue(stream, name);
    note(from, reads, work, stream.clock), note(to, writes, work, stream.clock);
    open_for_device(from, reads), open_for_device(to, writes);
    memcpy(to.data(), from.data(), to.bytes);
    close_for_device(from, reads, work), close_for_device(to, writes, work);
    spend(stream, to.bytes * 1000 / bytes_per_us);
    return work;
}
static void copy_to_device(const char* name, void* handle, Pointer dst, const void* src, size_t bytes, bool wait) {
    Stream& stream = own_stream(handle);
    if (!bytes) return;
    take(stream, [=](Stream& stream) {
        Span to = device_span(name, stream.context->device, dst, bytes), from = host_span(name, src, bytes);
        count_copy("h2d_bytes", bytes);
        catch_up(stream);
        // From pageable memory CUDA waits for the stream first, and returns as soon as it has read the source.
        if (wait && !from.memory) host_waits(stream.clock);
        copy(name, stream, to, from, settings().bus);
        if (wait && from.memory) host_waits(stream.clock);
    });
}
static void copy_to_host(const char* name, void* handle, void* dst, Pointer src, size_t bytes, bool wait) {
    Stream& stream = own_stream(handle);
    if (!bytes) return;
    take(stream, [=](Stream& stream) {
        Span to = host_span(name, dst, bytes), from = device_span(name, stream.context->device, src, bytes);
        count_copy("d2h_bytes", bytes);
        Work work = copy(name, stream, to, from, settings().bus);
        delay(to, from, work);
        if (wait || !to.memory) host_waits(stream.clock);  // to pageable memory even the asynchronous form waits
    });
}
static void copy_on_device(const char* name, void* handle, Pointer dst, Pointer src, size_t bytes,
                           const Context& dst_in, const Context& src_in) {
    Stream& stream = own_stream(handle);
    if (!bytes) return;
    if (dst < src + bytes && src < dst + bytes) refuse(invalid_value, "%s: source and destination overlap", name);
    take(stream, [=, dst_in = dst_in.device, src_in = src_in.device](Stream& stream) {
        Span to = device_span(name, dst_in, dst, bytes), from = device_span(name, src_in, src, bytes);
        count_copy("d2d_bytes", bytes);
        copy(name, stream, to, from, settings().dram);
    });
}
API cuMemcpyHtoD_v2(Pointer dst, const void* src, size_t bytes) {
    return call([=] { copy_to_device("cuMemcpyHtoD", nullptr, dst, src, bytes, true); });
}
API cuMemcpyHtoDAsync_v2(Pointer dst, const void* src, size_t bytes, void* stream) {
    return call([=] { copy_to_device("cuMemcpyHtoDAsync", stream, dst, src, bytes, false); });
}
API cuMemcpyDtoH_v2(void* dst, Pointer src, size_t bytes) {
    return call([=] { copy_to_host("cuMemcpyDtoH", nullptr, dst, src, bytes, true); });
}
API cuMemcpyDtoHAsync_v2(void* dst, Pointer src, size_t bytes, void* stream) {
    return call([=] { copy_to_host("cuMemcpyDtoHAsync", stream, dst, src, bytes, false); });
}
// Copies within a device. The plain form does not wait either, as in CUDA.
API cuMemcpyDtoDAsync_v2(Pointer dst, Pointer src, size_t bytes, void* stream) {
    return call([=] { copy_on_device("cuMemcpyDtoDAsync", stream, dst, src, bytes, context(), context()); });
}
API cuMemcpyDtoD_v2(Pointer dst, Pointer src, size_t bytes) { return cuMemcpyDtoDAsync_v2(dst, src, bytes, nullptr); }
API cuMemcpyPeerAsync(Pointer dst, Context* to, Pointer src, Context* from, size_t bytes, void* stream) {
    return call([=] { copy_on_device("cuMemcpyPeerAsync", stream, dst, src, bytes, *to, *from); });
}

template <class T> static void fill(const char* name, void* handle, Pointer dst, T value, size_t elements) {
    Stream& stream = own_stream(handle);
    if (!elements) return;
    if (dst % sizeof(T)) refuse(invalid_value, "%s: 0x%llx is misaligned", name, dst);
    take(stream, [=](Stream& stream) {
        Span to = device_span(name, stream.context->device, dst, elements * sizeof(T));
        count("memsets")++;
        Work work = enqueue(stream, name);
        note(to, writes, work, stream.clock);
        open_for_device(to, writes);
        std::fill_n((T*)to.data(), elements, value);
        close_for_device(to, writes, work);
        spend(stream, to.bytes * 1000 / settings().dram);
    });
}
API cuMemsetD8Async(Pointer dst, unsigned char value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD8Async", stream, dst, value, elements); });
}
API cuMemsetD16Async(Pointer dst, unsigned short value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD16Async", stream, dst, value, elements); });
}
API cuMemsetD32Async(Pointer dst, unsigned value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD32Async", stream, dst, value, elements); });
}
API cuMemsetD8_v2(Pointer dst, unsigned char value, size_t elements) {
    return cuMemsetD8Async(dst, value, elements, nullptr);
}
API cuMemsetD32_v2(Pointer dst, unsigned value, size_t elements) {
    return cuMemsetD32Async(dst, value, elements, nullptr);
}

}  // namespace standin
