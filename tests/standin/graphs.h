// Graphs: work that a capture keeps, and objects that live as long as any graph that has them.
#pragma once
#include <functional>

#include "handles.h"

namespace standin {

// Object of a caller. The last graph that has it calls `destroy`, which may not call the driver.
struct UserObject {
    void* value;
    void (*destroy)(void*);
    unsigned references;
};

// Work in the order of the capture, and then of each launch.
struct Graph {
    std::vector<std::function<void(Stream&)>> work;
    std::vector<UserObject*> objects;
};
static std::set<const void*>& graphs() {
    static auto* all = new std::set<const void*>;
    return *all;
}
static Graph* new_graph(const Graph& of) {
    auto* made = new Graph(of);
    for (UserObject* it : made->objects) it->references++;
    graphs().insert(made);
    return made;
}
static void release(UserObject* object) {
    if (--object->references) return;
    in_callback = true;
    object->destroy(object->value);
    in_callback = false;
    delete object;
}
static void delete_graph(Graph* gone) {
    graphs().erase(gone);
    for (UserObject* it : gone->objects) release(it);
    delete gone;
}
static Graph& graph_of(void* handle) { return live<Graph>(graphs(), handle, "graph"); }

API cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    return call([=] { *out = new_graph(graph_of(graph)); });
}
API cuGraphDestroy(void* graph) {
    return call(tolerant, [=] { delete_graph(&graph_of(graph)); });
}
API cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }
API cuUserObjectCreate(void** out, void* value, void (*destroy)(void*), unsigned references, unsigned flags) {
    return call([=] {
        bool valid = references && flags == 1;
        if (!valid) refuse(invalid_value, "a user object of %u references, flags %u", references, flags);
        *out = new UserObject{value, destroy, references};
    });
}
// Moves the references of the caller into the graph.
API cuGraphRetainUserObject(void* graph, void* object, unsigned references, unsigned flags) {
    return call([=] {
        if (references != 1 || flags != 1) refuse(not_supported, "the stand-in moves one reference of a user object");
        graph_of(graph).objects.push_back((UserObject*)object);
    });
}

}  // namespace standin
