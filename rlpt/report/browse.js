// The rollout browser: one state, which the address after # holds; every change draws from it.

class Browser {
  constructor(data, root) {
    this.data = data;
    this.root = root;
    this.part = (name) => root.querySelector(`[data-part=${name}]`);
    this.places = new Map(data.groups.map((group) => [keyOf(group), group]));
    this.twins = Map.groupBy(data.groups, promptOf);
    this.wanted = readFragment(location.hash);
    this.fillChoices();
    this.listen();
    this.search();
  }

  fillChoices() {
    const { groups, runs } = this.data;
    const offer = (name, values, label = String) => {
      const control = this.part("form").elements[name];
      for (const value of values) control.append(element("option", { value }, label(value)));
      control.closest("label").hidden = values.length < 2;
    };
    const distinct = (of) => [...new Set(of)];
    offer("run", runs.map((_, index) => index), (index) => runs[index]);
    offer("step", distinct(groups.map((group) => group.step)).sort((a, b) => a - b));
    offer("domain", distinct(groups.map((group) => group.domain)).filter(Boolean).sort());
    offer("finish", distinct(groups.flatMap((group) => group.thoughts.map((thought) => thought.finish))).filter(Boolean));
    for (const name of READS) this.part("form").elements[name].value = this.wanted[name];
  }

  listen() {
    const form = this.part("form");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      for (const name of READS) this.wanted[name] = form.elements[name].value;
      this.search();
    });
    this.part("clear").addEventListener("click", () => this.restart(""));
    const list = this.part("list");
    list.addEventListener("scroll", () => this.drawList(), { passive: true });
    list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.show(Number(row.dataset.index));
    });
    this.part("detail").addEventListener("click", (event) => this.clicked(event.target));
    window.addEventListener("hashchange", () => {
      if (location.hash.includes("=") && location.hash !== this.written) this.restart(location.hash);
    });
    new ResizeObserver(() => this.drawList()).observe(list);
  }

  /** From the beginning, as a link asks. */
  restart(fragment) {
    this.wanted = readFragment(fragment);
    for (const name of READS) this.part("form").elements[name].value = this.wanted[name];
    this.search();
  }

  clicked(target) {
    const jump = target.closest("[data-jump]");
    if (jump) return this.restart(`#${new URLSearchParams({ at: jump.dataset.jump })}`);
    const card = target.closest("[data-thought]");
    if (card) this.choose(Number(card.dataset.thought));
    const told = target.closest(".t")?.title;
    if (told) this.part("readout").textContent = told;
  }

  search() {
    this.items = select(this.data.groups, this.wanted);
    const thoughts = this.items.reduce((sum, item) => sum + item.hits.length, 0);
    const all = this.data.groups.length.toLocaleString("en");
    this.part("count").textContent = `${this.items.length.toLocaleString("en")} of ${all} prompts, ${thoughts.toLocaleString("en")} thoughts`;
    const at = this.items.findIndex((item) => keyOf(item.group) === this.wanted.at);
    this.part("rows").style.height = `${this.items.length * ROW}px`;
    this.part("list").scrollTop = 0;
    this.show(Math.max(0, at), at >= 0 ? this.wanted.thought - 1 : -1);
  }

  /** Row ``index`` and one of its thoughts; by default the one that the order picked. */
  show(index, thought = -1) {
    const item = this.items[index];
    this.index = index;
    this.wanted.at = item ? keyOf(item.group) : "";
    this.drawDetail(item);
    this.choose(thought in (item?.group.thoughts ?? []) ? thought : (item?.pick ?? 0));
    this.reveal(index);
    this.drawList();
  }

  reveal(index) {
    const list = this.part("list");
    const top = index * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  }

  /** Only the rows in view are elements. */
  drawList() {
    const list = this.part("list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 2);
    const last = Math.min(this.items.length, first + Math.ceil(list.clientHeight / ROW) + 5);
    const { runs } = this.data;
    const drawn = this.items.slice(first, last).map((item, i) => {
      const row = listRow(item, first + i, this.items.length, runs.length > 1 ? runs[item.group.run] : "");
      row.setAttribute("aria-selected", first + i === this.index);
      return row;
    });
    this.part("rows").replaceChildren(...drawn);
    list.setAttribute("aria-activedescendant", `row-${this.index}`);
  }

  drawDetail(item) {
    const detail = this.part("detail");
    if (!item) return detail.replaceChildren(element("p", { class: "none" }, "No thought is like that. Escape or \u201cclear\u201d shows all."));
    const { group } = item;
    const { runs, scale } = this.data;
    const twins = (this.twins.get(promptOf(group)) ?? []).filter((twin) => twin !== group);
    const others = twins.map((twin) => ({ key: keyOf(twin), name: runs[twin.run], best: rank(twin.thoughts[0]) }));
    const cards = group.thoughts.map((_, index) => thoughtCard(group, index, scale, item.hits.includes(index)));
    const strip = element("div", { class: "strip", tabindex: "0", role: "group", "aria-label": "thoughts, best first" }, ...cards);
    detail.replaceChildren(...promptCard(group, runs.length > 1 ? runs[group.run] : "", others), strip);
    // What stands right before the cut matters most.
    const context = detail.querySelector(".context");
    context.scrollTop = context.scrollHeight;
    this.part("readout").textContent = "";
  }

  /** Mark thought ``index`` and bring it into view, without moving the page. */
  choose(index) {
    const strip = this.part("detail").querySelector(".strip");
    const card = strip?.children[index];
    if (!card) return;
    for (const each of strip.children) each.toggleAttribute("data-chosen", each === card);
    strip.scrollLeft = card.offsetLeft - strip.offsetLeft - (strip.clientWidth - card.clientWidth) / 2;
    this.wanted.thought = index + 1;
    this.note();
  }

  /** The address follows, so that it can be copied; the page's own first view leaves it alone. */
  note() {
    if (!this.touched) return;
    clearTimeout(this.noting);
    // Browsers refuse an address that changes with every key press.
    this.noting = setTimeout(() => {
      this.written = writeFragment(this.wanted);
      history.replaceState(null, "", this.written);
    }, 200);
  }

  move(by) {
    const to = this.index + by;
    if (to in this.items) this.show(to);
  }

  turn(by) {
    this.choose(this.wanted.thought - 1 + by);
  }
}
