/* Calls a library for another machine under user-mode emulation, on the memory of the process that asks for it.
 *
 * The asking process writes a function's name (64 bytes) and nine integers or addresses to standard input. Both machines
 * lay out structs alike, so they are taken as they are: where the library touches an address that is not here, the page
 * is asked for (R, address; 4096 bytes come back) and mapped at that very address. After the call the bytes that changed
 * are sent (W, address, count, bytes), then the result (D, result, 0), and all pages are forgotten. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 1 << 16 };
static uintptr_t pages[PAGES]; /* a hash table of the pages here */
static char (*before)[PAGE];   /* what was in them */
static volatile int faults;

static void transfer(int is_out, void *data, size_t n) {
    for (char *at = data; n;) {
        ssize_t some = is_out ? write(1, at, n) : read(0, at, n);
        if (some <= 0) _exit(is_out ? 2 : 0); /* the asking process has ended */
        at += some, n -= (size_t)some;
    }
}

static void say(char what, uint64_t a, uint64_t b) {
    uint64_t words[3] = {(uint64_t)what, a, b};
    transfer(1, words, sizeof words);
}

static void fault(int number, siginfo_t *info, void *context) {
    uintptr_t page = (uintptr_t)info->si_addr / PAGE * PAGE;
    size_t i = page / PAGE % PAGES;
    (void)number, (void)context;
    while (pages[i] && pages[i] != page) i = (i + 1) % PAGES;
    if (pages[i]) _exit(3); /* is here already */
    say('R', page, 0);
    transfer(0, before[i], PAGE);
    if (mmap((void *)page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != (void *)page) _exit(4);
    memcpy((void *)page, before[i], PAGE);
    pages[i] = page;
    faults++;
}

static void give_back(size_t i) {
    char *now = (char *)pages[i];
    for (int at = memcmp(now, before[i], PAGE) ? 0 : PAGE, end; at < PAGE; at = end) {
        while (at < PAGE && now[at] == before[i][at]) at++;
        for (end = at; end < PAGE && now[end] != before[i][end];) end++;
        if (end == at) continue;
        say('W', pages[i] + (uintptr_t)at, (uint64_t)(end - at));
        transfer(1, now + at, (size_t)(end - at));
    }
    munmap(now, PAGE);
    pages[i] = 0;
}

int main(int count, char **arguments) {
    struct sigaction action = {.sa_sigaction = fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    void *library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    before = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!library || before == MAP_FAILED) return fprintf(stderr, "%s\n", library ? "no memory" : dlerror()), 1;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    say('D', 0, 0); /* ready */
    for (;;) {
        char name[64];
        int64_t a[9];
        transfer(0, name, sizeof name);
        transfer(0, a, sizeof a);
        int64_t (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
        *(void **)&function = dlsym(library, name);
        if (!function) return fprintf(stderr, "no function %s\n", name), 1;
        int64_t result;
        do { /* once more where pages came meanwhile: qemu 7.2 loses bytes of stores that it has to begin again */
            for (size_t i = 0; i < PAGES; i++)
                if (pages[i]) memcpy((void *)pages[i], before[i], PAGE);
            faults = 0;
            result = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
        } while (faults);
        for (size_t i = 0; i < PAGES; i++)
            if (pages[i]) give_back(i);
        say('D', (uint64_t)result, 0);
    }
}
