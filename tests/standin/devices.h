// Entry points for errors, initialization, devices and contexts.
#pragma once
#include "handles.h"

namespace standin {

static const CodeName* find_code(int code) {
    for (auto& it : code_names)
        if (it.code == code) return &it;
    return nullptr;
}
API cuGetErrorName(int code, const char** name) {
    const CodeName* it = find_code(code);
    *name = it ? it->name : nullptr;
    return it ? success : invalid_value;
}
API cuGetErrorString(int code, const char** text) {
    const CodeName* it = find_code(code);
    *text = it ? it->text : nullptr;
    return it ? success : invalid_value;
}
API cuInit(unsigned) {
    return call(tolerant, [] {
        if (settings().init) throw Failure{(int)settings().init, false, ""};
        if (settings().devices == 0) throw Failure{no_device, false, ""};
        driver().initialized = true;
    });
}
API cuDriverGetVersion(int* version) { return *version = (int)settings().driver, success; }
API cuDeviceGetCount(int* count) {
    return call(tolerant, [=] { need_initialized(), *count = (int)settings().devices; });
}
API cuDeviceGet(int* device, int ordinal) {
    return call(tolerant, [=] { *device = checked_device(ordinal); });
}
API cuDeviceGetName(char* name, int bytes, int device) {
    return call(tolerant, [=] { snprintf(name, bytes, "Stand-in GPU %d", checked_device(device)); });
}
API cuDeviceGetUuid_v2(char* uuid, int device) {
    return call(tolerant, [=] { memset(uuid, 0x5D, 16), uuid[15] = (char)checked_device(device); });
}
API cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API cuDeviceGetPCIBusId(char* text, int bytes, int device) {
    return call(tolerant, [=] { snprintf(text, bytes, "0000:%02x:00.0", checked_device(device) + 1); });
}
API cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return call(tolerant, [=] { checked_device(device), *bytes = settings().memory; });
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const std::map<int, int> values{
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535},  // threads, blocks, grids
        {8, 49152}, {9, 65536}, {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {19, 1}, {31, 1}, {36, 2619000},
        {37, 6144}, {38, 50 << 20}, {39, 2048}, {40, 3}, {41, 1}, {81, 233472}, {82, 65536}, {97, 232448}, {106, 32},
        {115, 1}};
    return call(tolerant, [=] {
        checked_device(device);
        int capability = (int)settings().capability;
        auto at = values.find(attribute);
        *value = at == values.end() ? 0 : at->second;
        if (attribute == 75) *value = capability / 10;
        if (attribute == 76) *value = capability % 10;
    });
}
API cuDeviceCanAccessPeer(int* can, int, int) { return *can = 0, success; }

// ---- Contexts

API cuDevicePrimaryCtxRetain(Context** out, int device) {
    return call([=] {
        Context*& it = driver().contexts[checked_device(device)];
        if (!it) {
            it = new Context{device, nullptr, {}, {}, {}};
            it->legacy = new_stream(*it, Stream::legacy, "legacy default stream");
        }
        *out = it;
    });
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    return call(tolerant, [=] { checked_device(device); });
}
API cuCtxGetCurrent(Context** out) {
    return call(tolerant, [=] { need_initialized(), *out = current; });
}
API cuCtxSetCurrent(Context* it) {
    return call(tolerant, [=] { need_initialized(), current = it; });
}
API cuCtxGetDevice(int* device) {
    return call(tolerant, [=] { *device = context().device; });
}
API cuCtxGetApiVersion(Context*, unsigned* version) { return *version = 3020, success; }
API cuCtxSetFlags(unsigned) { return call([] { context(); }); }
API cuCtxSetLimit(int, size_t) { return call([] { context(); }); }
API cuCtxGetLimit(size_t* value, int) { return call([=] { context(), *value = 1024; }); }
API cuCtxSetCacheConfig(int) { return call([] { context(); }); }
API cuCtxGetCacheConfig(int* value) { return call([=] { context(), *value = 0; }); }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call([=] { context(), *least = 0, *greatest = -5; });
}

}  // namespace standin
