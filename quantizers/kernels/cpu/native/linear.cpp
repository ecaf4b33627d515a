// One linear layer: quantize the inputs, multiply, split over the output rows.
#include "api.h"
#include "tokens.h"

namespace precis {
namespace {

thread_local Inputs t_inputs;
thread_local Buffer<uint8_t> t_panels;

struct Work {
    const Kernels* k;
    const Matrix* m;
    const float* x;
    float* y;
    Inputs* inputs;
    uint8_t* panels;  // one a thread: made beforehand, since no thread of a team may fail alone
};

void run(void* context, Team& team, int index) {
    auto& w = *static_cast<Work*>(context);
    const int tokens = w.inputs->view().tokens;
    const int64_t first = team.begin(tokens, index), end = team.begin(tokens, index + 1);
    w.inputs->fill(*w.k, w.x + first * w.m->columns, static_cast<int>(first), static_cast<int>(end));
    team.barrier();
    uint8_t* panel = w.panels + index * panel_bytes(w.m->columns);
    const int64_t units = unit_count(*w.m, tokens), unit0 = team.begin(units, index);
    multiply(*w.k, *w.m, w.inputs->view(), unit0, team.begin(units, index + 1), w.y + unit0 * unit_rows(tokens), w.m->rows, panel);
}

}  // namespace

void linear(const Matrix& m, const float* x, int tokens, float* y, int threads) {
    // A chunk of tokens at a time bounds the memory that a thread keeps; rows do not depend on each other.
    constexpr int kTokens = 1024;
    uint8_t* panels = t_panels.reserve(static_cast<size_t>(panel_bytes(m.columns) * threads));
    for (int done = 0; done < tokens; done += kTokens) {
        const int count = std::min(kTokens, tokens - done);
        const float* rows = x + int64_t{done} * m.columns;
        t_inputs.prepare(bit(m.kind), count, m.columns, rows);
        Work work{&kernels(), &m, rows, y + int64_t{done} * m.rows, &t_inputs, panels};
        run_on_threads(threads, run, &work);
    }
}

}  // namespace precis
