"""Charts of what runs leave: functions of rows that return Vega-Lite specifications."""
