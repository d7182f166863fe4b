"use strict";
/* The list of episodes. Only the rows that can be seen exist, so that ten thousand are as quick as ten. */

const ROW = 70; // pixels, as in the style sheet
const AROUND = 6; // rows made above and below those that can be seen

class EpisodeList {
  constructor(box, rows, chosen) {
    this.box = box;
    this.rows = rows;
    this.chosen = chosen;
    this.places = [];
    this.current = -1;
    box.addEventListener("scroll", () => this.draw(), {passive: true});
    new ResizeObserver(() => this.draw()).observe(box);
    rows.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) this.choose(Number(row.dataset.index), true);
    });
  }

  /* Show other episodes; the one at `place` stays chosen if it is among them. */
  show(run, beside, places, place) {
    Object.assign(this, {run, beside, places});
    this.current = places.indexOf(place);
    this.rows.style.height = `${places.length * ROW}px`;
    this.reveal();
    this.draw();
  }

  choose(index, read = false) {
    if (!this.places.length) return;
    this.current = Math.max(0, Math.min(index, this.places.length - 1));
    this.reveal();
    this.draw();
    this.chosen(this.places[this.current], read);
  }

  move(by) {
    this.choose(this.current < 0 ? 0 : this.current + by);
  }

  get page() {
    return Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
  }

  reveal() {
    if (this.current < 0) return;
    const top = this.current * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - AROUND);
    const last = Math.min(this.places.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + AROUND);
    const made = [];
    for (let index = first; index < last; index++) made.push(this.row(index));
    this.rows.replaceChildren(...made);
    if (this.current >= first && this.current < last) this.box.setAttribute("aria-activedescendant", `row-${this.current}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(index) {
    const {run, beside} = this;
    const place = this.places[index];
    const question = run.question[place];
    const turns = run.turns[place];
    const notes = [questions.dataset[question], `${turns} turn${turns === 1 ? "" : "s"}`, `F1 ${percent(run.f1[place])}`];
    if (run.stop[place] !== "answered") notes.push(spoken(run.stop[place]));
    const verdicts = [verdictMark(verdictOf(run, place))];
    const twin = beside && twinOf(run, place, beside);
    if (beside) verdicts.push(twin === undefined ? el("span", {class: "mark none"}, "·") : verdictMark(verdictOf(beside, twin)));
    const made = el("div", {
      class: "row", role: "option", id: `row-${index}`, "data-index": index, "aria-selected": String(index === this.current),
      "aria-posinset": index + 1, "aria-setsize": this.places.length,
    }, el("span", {class: "marks"}, verdicts), el("span", {class: "asked"}, questions.text[question]),
    el("span", {class: "notes"}, notes.join(" · ")));
    made.style.top = `${index * ROW}px`;
    return made;
  }
}

const percent = (share) => (100 * share).toFixed(0);

const SIGNS = {won: "✓", lost: "✗", failed: "!"};
function verdictMark(verdict) {
  return el("span", {class: `mark ${verdict}`, title: verdict}, el("span", {"aria-hidden": "true"}, SIGNS[verdict]),
    el("span", {class: "unseen"}, verdict));
}
