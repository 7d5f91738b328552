// Tests that every check of the stand-in driver can fail, and that correct programs pass. Each case runs in a process
// of its own, which opens the library (built with -DSTANDIN_SELFTEST) with the case's environment variables.
//
//     selftest path/to/libcuda.so.1 [part of the names of cases]
#include <sys/wait.h>
#include <unistd.h>

#include "selftest_ordering.h"
#include "selftest_capture.h"
#include "selftest_times.h"
#include "selftest_faults.h"  // last: cases run in the order of the files

static std::string contents(FILE* file) {
    std::string text;
    rewind(file);
    for (int byte; (byte = fgetc(file)) != EOF;) text += (char)byte;
    return text;
}
static void set_environment(const std::string& settings) {
    for (size_t at = 0; at < settings.size();) {
        size_t end = std::min(settings.find(' ', at), settings.size()), equals = settings.find('=', at);
        setenv(settings.substr(at, equals - at).c_str(), settings.substr(equals + 1, end - equals - 1).c_str(), 1);
        at = end + 1;
    }
}
static int run_case(const Case& it, const char* path) {
    set_environment(it.environment);
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return printf("    %s\n", dlerror()), 1;
    it.run();
    fflush(stdout);
    return wrong;
}
static bool passes(const Case& it, const char* path) {
    FILE* messages = tmpfile();
    pid_t child = fork();
    if (child == 0) {
        dup2(fileno(messages), 2);
        _exit(run_case(it, path));
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::string text = contents(messages);
    fclose(messages);
    bool printed = it.message ? text.find(it.message) != std::string::npos : text.empty();
    bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0 && printed;
    if (!good) printf("FAILED %s (status %d); printed:\n%s\n", it.name, status, text.c_str());
    return good;
}

int main(int count, char** arguments) {
    if (count < 2) return fprintf(stderr, "usage: selftest path/to/libcuda.so.1 [part of a name]\n"), 2;
    int run = 0, failed = 0;
    for (const Case& it : cases) {
        if (count > 2 && !strstr(it.name, arguments[2])) continue;
        run++, failed += !passes(it, arguments[1]);
        fflush(stdout);
    }
    printf("%d cases, %d failed\n", run, failed);
    return failed != 0 || run == 0;
}
